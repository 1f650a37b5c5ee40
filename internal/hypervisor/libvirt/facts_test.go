package libvirt

import (
	"slices"
	"strings"
	"testing"

	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/sys"
)

const runningDomain = `<domain type='kvm' id='3'>
  <name>web</name>
  <uuid>0e2f7a9c-6a54-4ac9-a8cd-5f3f4c9d3a11</uuid>
  <memory unit='MiB'>2048</memory>
  <vcpu>4</vcpu>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
  <cpu mode='custom'><model>EPYC</model></cpu>
  <devices>
    <interface type='bridge'>
      <mac address='52:54:00:12:34:56'/><source bridge='br0'/><target dev='vnet3'/>
    </interface>
    <interface type='network'>
      <mac address='52:54:00:12:34:57'/><source network='default' bridge='virbr0'/><target dev='vnet4'/>
    </interface>
    <interface type='user'><mac address='52:54:00:12:34:58'/></interface>
    <serial type='pty'><source path='/dev/pts/5'/></serial>
  </devices>
</domain>`

func TestParseFacts(t *testing.T) {
	f, err := parseFacts(runningDomain)
	if err != nil {
		t.Fatal(err)
	}
	if f.memory != 2<<30 || f.vcpus != 4 || f.machine != "pc-q35-7.2" || f.accelerator != "kvm" || f.cpu != "EPYC" || f.console != "/dev/pts/5" {
		t.Errorf("%+v", f)
	}
	if !slices.Equal(f.bridges, []string{"br0", "virbr0"}) {
		t.Errorf("bridges %q", f.bridges)
	}
	if len(f.cards) != 2 || f.cards[0].Tap != "vnet3" || f.cards[1].Bridge != "virbr0" || f.cards[1].MAC.String() != "52:54:00:12:34:57" {
		t.Errorf("cards %v", f.cards)
	}
	for _, bad := range []string{"", "<domain", strings.Replace(runningDomain, "'MiB'", "'barrels'", 1), strings.Replace(runningDomain, "52:54:00:12:34:56", "a card", 1)} {
		if _, err := parseFacts(bad); err == nil {
			t.Errorf("no error for %.40q", bad)
		}
	}
}

// A device that keeps a domain from being moved is named.
func TestDeviceReasons(t *testing.T) {
	for device, want := range map[string]string{
		"<hostdev mode='subsystem' type='pci'><source><address domain='0' bus='1' slot='0' function='0'/></source></hostdev>": "hostdev",
		"<interface type='vhostuser'><source type='unix' path='/run/s' mode='client'/></interface>":                           "vhostuser interface",
		"<interface type='direct'><source dev='eth0' mode='bridge'/></interface>":                                             "macvtap interface on eth0",
		"<filesystem type='mount'><driver type='virtiofs'/><source dir='/srv'/><target dir='srv'/></filesystem>":              "virtiofs",
		"<filesystem type='mount'><source dir='/srv'/><target dir='srv'/></filesystem>":                                       "file system",
		"<shmem name='s'><model type='ivshmem-plain'/></shmem>":                                                               "shmem",
		"<memory model='dimm'><target><size unit='MiB'>64</size></target></memory>":                                           "memory device",
	} {
		var x libvirtxml.Domain
		if err := x.Unmarshal("<domain type='kvm'><devices>" + device + "</devices></domain>"); err != nil {
			t.Fatal(err)
		}
		if got := deviceReasons(&x); len(got) != 1 || !strings.Contains(got[0], want) {
			t.Errorf("%s: %q", device, got)
		}
	}
	var x libvirtxml.Domain
	if err := x.Unmarshal(runningDomain); err != nil {
		t.Fatal(err)
	}
	if got := deviceReasons(&x); len(got) != 0 {
		t.Errorf("an ordinary domain: %q", got)
	}
}

// Mappings that the kernel keeps apart are one extent where they follow one
// another in the file too.
func TestExtents(t *testing.T) {
	maps, err := sys.ParseMaps(strings.NewReader(`7f0000000000-7f0000100000 rw-s 00000000 00:1b 41 /dev/shm/a/pc.ram
7f0000100000-7f0008000000 rw-s 00100000 00:1b 41 /dev/shm/a/pc.ram
7f0010000000-7f0018000000 rw-s 00000000 00:01 42 /memfd:memory-backend-memfd (deleted)
7f0020000000-7f0020001000 rw-p 00000000 00:1b 43 /dev/shm/private
7f0030000000-7f0030001000 rw-s 00001000 00:1b 44 /dev/shm/middle
`))
	if err != nil {
		t.Fatal(err)
	}
	got := extents(maps)
	if len(got) != 2 || got[0].end-got[0].start != 128<<20 || got[1].end-got[1].start != 128<<20 {
		t.Fatalf("%+v", got)
	}
	file := backend{Kind: "memory-backend-file", Path: "/dev/shm//a/pc.ram"}
	memfd := backend{Kind: "memory-backend-memfd"}
	if !file.owns(got[0].path) || file.owns(got[1].path) || memfd.owns(got[0].path) || !memfd.owns(got[1].path) {
		t.Errorf("paths %q and %q", got[0].path, got[1].path)
	}
}

func TestBackendWhy(t *testing.T) {
	for b, movable := range map[backend]bool{
		{Kind: "memory-backend-file", ID: "pc.ram", Path: "/nonexistent/pc.ram", Share: true}: true,
		{Kind: "memory-backend-memfd", Share: true}:                                           true,
		{Kind: "memory-backend-memfd"}:                                                        false,
		{Kind: "memory-backend-ram"}:                                                          false,
		{Kind: "memory-backend-ram", Share: true}:                                             false,
		{Kind: "memory-backend-file", Path: "/", Share: true}:                                 false, // a folder: huge pages
	} {
		if why := b.why(); (why == "") != movable {
			t.Errorf("%+v: %q", b, why)
		}
	}
}

func TestParseUser(t *testing.T) {
	if uid, gid, err := parseUser("+64055:+108"); uid != 64055 || gid != 108 || err != nil {
		t.Errorf("%d %d %v", uid, gid, err)
	}
	for _, bad := range []string{"", "+1", "libvirt-qemu:kvm", "+1:+x"} {
		if _, _, err := parseUser(bad); err == nil {
			t.Errorf("no error for %q", bad)
		}
	}
}
