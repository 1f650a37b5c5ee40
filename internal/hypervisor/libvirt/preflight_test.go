package libvirt

import (
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	lv "github.com/digitalocean/go-libvirt"
	"github.com/vishvananda/netlink"
	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

func domainOf(t *testing.T, inside string) *libvirtxml.Domain {
	t.Helper()
	var x libvirtxml.Domain
	if err := x.Unmarshal("<domain type='kvm'><uuid>0e2f7a9c-6a54-4ac9-a8cd-5f3f4c9d3a11</uuid>" + inside + "</domain>"); err != nil {
		t.Fatal(err)
	}
	return &x
}

// only is the one check that there must be.
func only(t *testing.T, what string, c hypervisor.Checks, v hypervisor.Verdict, want string) {
	t.Helper()
	if len(c) != 1 || c[0].Verdict != v || !strings.Contains(c[0].Detail, want) || v != hypervisor.Pass && c[0].Advice == "" {
		t.Errorf("%s: %+v, wanted verdict %d and %q", what, c, v, want)
	}
}

func TestExamineDisks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk") // no host shares a test's folder
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		disk    string
		verdict hypervisor.Verdict
		want    string
	}{
		{"<driver cache='none'/><source file='%s'/>", hypervisor.Warn, "cache mode none"},
		{"<source file='%s'/>", hypervisor.Warn, "cache mode writeback"},
		{"<driver cache='unsafe'/><source file='%s'/>", hypervisor.Fail, "may never leave this host"},
		{"<driver cache='unsafe'/><source dev='/dev/null'/>", hypervisor.Fail, "a block device"},
		{"<driver cache='writethrough'/><source dev='/dev/null'/>", hypervisor.Pass, "cache mode writethrough"},
		{"<source file='%s'/><readonly/>", hypervisor.Pass, "read only"},
		{"", hypervisor.Pass, "empty"},
	} {
		disk := test.disk
		if strings.Contains(disk, "%s") {
			disk = fmt.Sprintf(disk, path)
		}
		kind := "file"
		if strings.Contains(disk, "dev=") {
			kind = "block"
		}
		var c hypervisor.Checks
		examineDisks(domainOf(t, "<devices><disk type='"+kind+"'>"+disk+"<target dev='vda'/></disk></devices>"), &c)
		only(t, disk, c, test.verdict, test.want)
		if c[0].Name != "disk vda" {
			t.Errorf("%s: name %q", disk, c[0].Name)
		}
	}
	var c hypervisor.Checks
	examineDisks(domainOf(t, "<devices><disk type='network'><source protocol='rbd' name='pool/image'/></disk></devices>"), &c)
	only(t, "rbd", c, hypervisor.Pass, "over the network")
}

func TestExamineOwnership(t *testing.T) {
	dir := t.TempDir()
	path, conf := filepath.Join(dir, "disk"), filepath.Join(dir, "qemu.conf")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	x := domainOf(t, "<devices><disk type='file'><source file='"+path+"'/></disk></devices>")
	d := &Driver{cfg: Config{QEMUConf: conf}}
	var c hypervisor.Checks
	d.examineOwnership(x, &c) // without the file, libvirt's defaults hold
	only(t, "by default", c, hypervisor.Warn, "may take the disk")
	if err := os.WriteFile(conf, []byte("dynamic_ownership = 0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c = nil
	if d.examineOwnership(x, &c); len(c) != 0 {
		t.Errorf("with fixed owners: %+v", c)
	}
}

func TestParseQEMUConf(t *testing.T) {
	c := parseQEMUConf("#dynamic_ownership = 0\n  memory_backing_dir = \"/dev/shm\" # fast\n")
	if !c.dynamicOwnership || c.memoryBackingDir != "/dev/shm" {
		t.Errorf("%+v", c)
	}
	if c := parseQEMUConf("dynamic_ownership=0"); c.dynamicOwnership || c.memoryBackingDir != "/var/lib/libvirt/qemu/ram" {
		t.Errorf("%+v", c)
	}
}

func TestExamineNVRAM(t *testing.T) {
	dir := t.TempDir()
	there, template := filepath.Join(dir, "there"), filepath.Join(dir, "template")
	for _, path := range []string{there, template} {
		if err := os.WriteFile(path, []byte("variables"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		path, template string
		verdict        hypervisor.Verdict
		want           string
	}{
		{there, template, hypervisor.Pass, "takes the guest's variables"},
		{filepath.Join(dir, "new"), template, hypervisor.Pass, "will be made of"},
		{filepath.Join(dir, "new"), "", hypervisor.Pass, "will be made"},
		{filepath.Join(dir, "new"), template + "2", hypervisor.Fail, "which is not on this host"},
		{filepath.Join(dir, "none", "new"), template, hypervisor.Fail, "no folder for"},
	} {
		x := domainOf(t, "<os><nvram template='"+test.template+"'>"+test.path+"</nvram></os>")
		var c hypervisor.Checks
		examineNVRAM(&offer{NVRAM: 9}, x, &c)
		only(t, test.path, c, test.verdict, test.want)
	}
	var c hypervisor.Checks
	examineNVRAM(&offer{NVRAM: 10}, domainOf(t, "<os><nvram>"+there+"</nvram></os>"), &c)
	only(t, "another size", c, hypervisor.Fail, "9 bytes here and 10 at the source")
	if n, err := sizeOfNVRAM(domainOf(t, "<os><nvram>"+there+"</nvram></os>")); n != 9 || err != nil {
		t.Errorf("size %d, %v", n, err)
	}
	c = nil
	if examineNVRAM(&offer{}, domainOf(t, ""), &c); len(c) != 0 {
		t.Errorf("without one: %+v", c)
	}
}

func TestExamineTPM(t *testing.T) {
	const emulated = "<devices><tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices>"
	for tpm, v := range map[string]hypervisor.Verdict{
		emulated: hypervisor.Pass,
		"<devices><tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm></devices>": hypervisor.Fail,
	} {
		var c hypervisor.Checks
		examineTPM(domainOf(t, tpm), &c)
		only(t, tpm, c, v, "")
	}
	for values, v := range map[string]hypervisor.Verdict{"passthrough": hypervisor.Fail, "passthrough emulator": hypervisor.Pass} {
		caps := &libvirtxml.DomainCaps{Devices: &libvirtxml.DomainCapsDevices{TPM: &libvirtxml.DomainCapsDevice{
			Enums: []libvirtxml.DomainCapsEnum{{Name: "backendModel", Values: strings.Fields(values)}},
		}}}
		var c hypervisor.Checks
		examineEmulatedTPM(caps, domainOf(t, emulated), &c)
		only(t, values, c, v, "")
	}
	var c hypervisor.Checks
	if examineEmulatedTPM(&libvirtxml.DomainCaps{}, domainOf(t, ""), &c); len(c) != 0 {
		t.Errorf("without a TPM: %+v", c)
	}
}

func TestCompareSecurity(t *testing.T) {
	label := "<seclabel type='static' model='apparmor' relabel='yes'><label>x</label></seclabel>"
	for _, test := range []struct {
		here, there []string
		inside      string
		verdict     hypervisor.Verdict
		want        string
	}{
		{nil, nil, "", hypervisor.Pass, "no security model but users"},
		{[]string{"apparmor"}, []string{"apparmor"}, label, hypervisor.Pass, "apparmor"},
		{nil, []string{"apparmor"}, "", hypervisor.Warn, "apparmor confines the guest at the source"},
		{nil, []string{"apparmor"}, label, hypervisor.Fail, "a label of apparmor"},
	} {
		var c hypervisor.Checks
		compareSecurity(test.here, &offer{Security: test.there}, domainOf(t, test.inside), &c)
		only(t, fmt.Sprint(test), c, test.verdict, test.want)
	}
	var caps libvirtxml.Caps
	if err := xml.Unmarshal([]byte("<capabilities><host><secmodel><model>dac</model></secmodel><secmodel><model>selinux</model></secmodel></host></capabilities>"), &caps); err != nil {
		t.Fatal(err)
	}
	if m := securityModels(&caps); !slices.Equal(m, []string{"selinux"}) {
		t.Errorf("models %q", m)
	}
}

func TestJudgeCPU(t *testing.T) {
	custom := &libvirtxml.DomainCPU{Mode: "custom", Check: "full", Model: &libvirtxml.DomainCPUModel{Value: "EPYC"}}
	unchecked := &libvirtxml.DomainCPU{Mode: "custom", Check: "none", Model: custom.Model}
	host := &libvirtxml.DomainCPU{Mode: "host-passthrough"}
	for _, test := range []struct {
		cpu     *libvirtxml.DomainCPU
		result  lv.CPUCompareResult
		verdict hypervisor.Verdict
		want    string
	}{
		{custom, lv.CPUCompareIdentical, hypervisor.Pass, "EPYC"},
		{custom, lv.CPUCompareSuperset, hypervisor.Pass, "all that the source does"},
		{custom, lv.CPUCompareIncompatible, hypervisor.Fail, "lacks avx"},
		{custom, lv.CPUCompareError, hypervisor.Fail, "lacks avx"},
		{unchecked, lv.CPUCompareIncompatible, hypervisor.Warn, "check='none'"},
		{host, lv.CPUCompareIdentical, hypervisor.Pass, "the same CPU"},
		{host, lv.CPUCompareSuperset, hypervisor.Warn, "has more"},
		{host, lv.CPUCompareIncompatible, hypervisor.Fail, "host-passthrough: it lacks avx"},
		{host, lv.CPUCompareError, hypervisor.Warn, "does not say"},
		{nil, lv.CPUCompareIncompatible, hypervisor.Fail, "the default"},
	} {
		named, err := namedCPU(&libvirtxml.Domain{CPU: test.cpu})
		if err != nil {
			t.Fatal(err)
		}
		var c hypervisor.Checks
		judgeCPU(test.cpu, named != "", test.result, "it lacks avx", &c)
		only(t, fmt.Sprint(test), c, test.verdict, test.want)
	}
}

func TestExamineAddress(t *testing.T) {
	x := domainOf(t, `<devices>
<graphics type='vnc'><listen type='address' address='0.0.0.0'/><listen type='address' address='192.0.2.99'/></graphics>
<graphics type='spice'><listen type='address' address='::1'/><listen type='address' address='2001:db8::99'/></graphics></devices>`)
	if all := listeners(x); !slices.Equal(all, []string{"192.0.2.99", "2001:db8::99"}) {
		t.Errorf("listeners %q", all)
	}
	links, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	defer links.Close()
	d := &Driver{links: links}
	for address, v := range map[string]hypervisor.Verdict{"127.0.0.1": hypervisor.Pass, "192.0.2.99": hypervisor.Fail} {
		var c hypervisor.Checks
		if err := d.examineAddress(address, &c); err != nil {
			t.Fatal(err)
		}
		only(t, address, c, v, address)
	}
	var c hypervisor.Checks
	d.examineBridge("lmctl-none", &c)
	only(t, "no bridge", c, hypervisor.Fail, "there is no bridge lmctl-none")
}

func TestStatfsUp(t *testing.T) {
	dir := t.TempDir()
	at, st, err := statfsUp(filepath.Join(dir, "not", "yet"))
	if err != nil || at != dir || st.Bsize == 0 {
		t.Errorf("%q %+v %v", at, st, err)
	}
}
