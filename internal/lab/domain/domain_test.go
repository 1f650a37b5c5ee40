package domain

import (
	"strings"
	"testing"

	"libvirt.org/go/libvirtxml"
)

// Whether libvirt takes the shapes is tested by package lab, with a libvirtd.
func TestXML(t *testing.T) {
	for _, tt := range []struct {
		shape Shape
		guest Guest
		want  []string
	}{
		{Shape{}, Guest{Disk: "/d"}, []string{`type="qemu"`, `<source type="file">`, `<access mode="shared">`, `cache="none"`, `dev="vda" bus="virtio"`, `<boot dev="hd">`}},
		{Shape{Backing: Memfd, Bus: "scsi"}, Guest{KVM: true, Disk: "/d"}, []string{`type="kvm"`, `<source type="memfd">`, `dev="sda" bus="scsi"`, `model="virtio-scsi"`}},
		{Shape{Nodes: 2}, Guest{VCPUs: 3}, []string{`<cell id="0" cpus="0,2" memory="32" unit="MiB">`, `<cell id="1" cpus="1" memory="32" unit="MiB">`}},
		{Shape{UEFI: true}, Guest{Name: "g", Kernel: "/k", Bridge: "br0", MAC: "52:54:00:00:00:01"}, []string{FirmwareCode, NVRAM("g"), `<kernel>/k</kernel>`, `<source bridge="br0">`}},
	} {
		tt.guest.Memory = 64 << 20
		tt.guest.VCPUs = max(1, tt.guest.VCPUs)
		text, err := tt.shape.XML(tt.guest)
		if err != nil {
			t.Errorf("%+v: %v", tt.shape, err)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(text, want) {
				t.Errorf("%+v: no %s in\n%s", tt.shape, want, text)
			}
		}
		if err := new(libvirtxml.Domain).Unmarshal(text); err != nil {
			t.Errorf("%+v: %v", tt.shape, err)
		}
	}
}

func TestPrivateMemoryHasNoBacking(t *testing.T) {
	text, err := Shape{Backing: Private}.XML(Guest{Memory: 64 << 20, VCPUs: 1})
	if err != nil || strings.Contains(text, "memoryBacking") {
		t.Errorf("%v: %s", err, text)
	}
}

func TestRefused(t *testing.T) {
	for _, tt := range []struct {
		shape Shape
		guest Guest
	}{
		{Shape{}, Guest{Memory: 0, VCPUs: 1}},
		{Shape{}, Guest{Memory: 1<<20 + 1, VCPUs: 1}},
		{Shape{}, Guest{Memory: 64 << 20}},
		{Shape{Nodes: 3}, Guest{Memory: 64 << 20, VCPUs: 1}},
		{Shape{Nodes: -1}, Guest{Memory: 64 << 20, VCPUs: 1}},
		{Shape{Backing: "stone"}, Guest{Memory: 64 << 20, VCPUs: 1}},
	} {
		if text, err := tt.shape.XML(tt.guest); err == nil {
			t.Errorf("%+v %+v: %s", tt.shape, tt.guest, text)
		}
	}
}

// What migrations may meet is in some case.
func TestCasesHaveEverything(t *testing.T) {
	names := make(map[string]bool)
	seen := make(map[any]bool)
	for _, c := range Cases() {
		if names[c.Name] {
			t.Errorf("two cases are called %s", c.Name)
		}
		names[c.Name] = true
		s := c.Shape
		for _, what := range []any{
			s.Machine, "bus " + s.Bus, "format " + s.Format, "cache " + s.Cache, "aio " + s.AIO, s.Backing, c.VCPUs,
			[2]any{"nodes", s.Nodes}, [2]any{"uefi", s.UEFI}, [2]any{"transient", s.Transient}, [2]any{"linux", c.Linux},
			[2]any{"devices", s.Balloon && s.RNG && s.Watchdog && s.Channel && s.VGA}, [2]any{"high", c.Memory >= aboveTheHole},
		} {
			seen[what] = true
		}
	}
	for _, want := range []any{
		"", "q35", "bus ", "bus scsi", "bus ide", "bus sata", "format ", "format qcow2", "cache ", "cache writeback",
		"aio native", "aio threads", "aio io_uring", Backing(""), Memfd, Private, 1, 2, [2]any{"nodes", 2}, [2]any{"uefi", true},
		[2]any{"transient", true}, [2]any{"linux", true}, [2]any{"devices", true}, [2]any{"high", true},
	} {
		if !seen[want] {
			t.Errorf("no case has %v", want)
		}
	}
}
