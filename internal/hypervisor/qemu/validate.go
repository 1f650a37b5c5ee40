package qemu

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/google/uuid"
)

var (
	namePattern    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	machinePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	cpuPattern     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._=,+-]*$`)
	serialPattern  = regexp.MustCompile(`^[A-Za-z0-9._ -]{1,36}$`)
	modelPattern   = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)
)

// Limits of a definition.
const (
	minMemory = 1 << 20
	maxMemory = 64 << 40
	maxVCPUs  = 1024
	maxCPU    = 4096 // bytes of the model with its features
	maxDisks  = 32
	maxNICs   = 16
	maxExtra  = 256
)

// ValidName says whether a guest can have this name.
func ValidName(name string) bool { return namePattern.MatchString(name) }

// validation gathers what is wrong with a definition.
type validation struct {
	file     *ast.File
	problems []Problem
}

func (v *validation) bad(field, format string, args ...any) {
	line, column := place(v.file, field)
	v.problems = append(v.problems, Problem{Line: line, Column: column, Field: field, Message: fmt.Sprintf(format, args...)})
}

// oneOf accepts an empty value, which stands for the default.
func (v *validation) oneOf(field, value string, allowed ...string) {
	if value != "" && !slices.Contains(allowed, value) {
		v.bad(field, "%q is not known: write %s or %s", value,
			strings.Join(allowed[:len(allowed)-1], ", "), allowed[len(allowed)-1])
	}
}

func (v *validation) absolute(field, path string) {
	switch {
	case path == "":
	case !filepath.IsAbs(path) || filepath.Clean(path) != path:
		v.bad(field, "%q must be an absolute path without . or .. in it", path)
	case strings.ContainsAny(path, "\x00\n"):
		v.bad(field, "%q holds a character that no path may have here", path)
	}
}

func (v *validation) definition(d *Definition) {
	v.identity(d)
	v.machine(d)
	v.boot(d)
	if len(d.Disks) > maxDisks {
		v.bad("disks", "%d are more than the %d that a guest may have", len(d.Disks), maxDisks)
	}
	for i := range d.Disks {
		v.disk(fmt.Sprintf("disks[%d]", i), &d.Disks[i])
	}
	if len(d.NICs) > maxNICs {
		v.bad("nics", "%d are more than the %d that a guest may have", len(d.NICs), maxNICs)
	}
	macs := make(map[string]bool)
	for i := range d.NICs {
		v.nic(fmt.Sprintf("nics[%d]", i), &d.NICs[i], macs)
	}
	v.extra(d.ExtraArguments)
}

func (v *validation) identity(d *Definition) {
	switch {
	case d.Name == "":
		v.bad("name", "it is missing: give the guest a name")
	case !ValidName(d.Name):
		v.bad("name", "%q cannot be a name: letters, digits and . _ - are allowed, at most 64, the first one a letter or a digit", d.Name)
	}
	if d.UUID != "" {
		id, err := uuid.Parse(d.UUID)
		if err != nil || id.String() != d.UUID {
			v.bad("uuid", "%q is no UUID in lower case, like 01234567-89ab-cdef-0123-456789abcdef; leave it out to get a fresh one", d.UUID)
		}
	}
}

func (v *validation) machine(d *Definition) {
	switch {
	case d.Memory == 0:
		v.bad("memory", "it is missing: say how much RAM the guest has, like 512MiB")
	case d.Memory == badSize:
		v.bad("memory", "it is no size: write it like 512MiB or 4GiB")
	case d.Memory%minMemory != 0 || d.Memory < minMemory || d.Memory > maxMemory:
		v.bad("memory", "%s must be a multiple of 1MiB and at most %s", d.Memory, Size(maxMemory))
	}
	if d.VCPUs < 0 || d.VCPUs > maxVCPUs {
		v.bad("vcpus", "%d must be from 1 to %d", d.VCPUs, maxVCPUs)
	}
	if d.Machine != "" && !machinePattern.MatchString(d.Machine) {
		v.bad("machine", "%q is no machine type: write pc, q35 or a versioned one like pc-i440fx-7.2", d.Machine)
	}
	if d.CPU != "" && (!cpuPattern.MatchString(d.CPU) || len(d.CPU) > maxCPU) {
		v.bad("cpu", "%q is no CPU model: write one like host, qemu64 or EPYC,+x2apic", d.CPU)
	}
	v.oneOf("accelerator", string(d.Accelerator), "auto", "kvm", "tcg")
	v.absolute("qemu", d.QEMU)
	v.absolute("firmware-dir", d.FirmwareDir)
}

func (v *validation) boot(d *Definition) {
	v.absolute("firmware", d.Firmware)
	v.absolute("kernel", d.Kernel)
	v.absolute("initrd", d.Initrd)
	if d.Kernel == "" && d.Initrd != "" {
		v.bad("initrd", "it needs a kernel: set kernel too, or leave both out to boot from a disk")
	}
	if d.Kernel == "" && d.Cmdline != "" {
		v.bad("cmdline", "it needs a kernel: set kernel too, or leave both out to boot from a disk")
	}
	if strings.ContainsRune(d.Cmdline, 0) {
		v.bad("cmdline", "it holds a zero byte")
	}
}

func (v *validation) disk(field string, d *Disk) {
	if d.Path == "" {
		v.bad(field+".path", "it is missing: say where the disk is")
	}
	v.absolute(field+".path", d.Path)
	v.oneOf(field+".format", d.Format, "raw", "qcow2")
	v.oneOf(field+".cache", d.Cache, "none", "writeback", "writethrough", "directsync", "unsafe")
	v.oneOf(field+".aio", d.AIO, "threads", "native", "io_uring")
	v.oneOf(field+".bus", d.Bus, "virtio", "ide", "scsi")
	if d.AIO == "native" && d.Cache != "" && d.Cache != "none" && d.Cache != "directsync" {
		v.bad(field+".aio", "native needs the cache mode none or directsync, here it is %s", d.Cache)
	}
	if d.Serial != "" && !serialPattern.MatchString(d.Serial) {
		v.bad(field+".serial", "%q cannot be a serial number: letters, digits, blanks and . _ - are allowed, at most 36", d.Serial)
	}
}

func (v *validation) nic(field string, n *NIC, macs map[string]bool) {
	switch {
	case n.Bridge == "":
		v.bad(field+".bridge", "it is missing: name a bridge of the host")
	case len(n.Bridge) > 15 || strings.ContainsAny(n.Bridge, "/ \t\n:%") || n.Bridge == "." || n.Bridge == "..":
		v.bad(field+".bridge", "%q cannot be the name of a bridge", n.Bridge)
	}
	if n.MAC != "" {
		mac, err := net.ParseMAC(n.MAC)
		switch {
		case err != nil || len(mac) != 6 || mac.String() != n.MAC:
			v.bad(field+".mac", "%q is no MAC in lower case, like 52:54:00:12:34:56; leave it out to get a fresh one", n.MAC)
		case mac[0]&1 != 0:
			v.bad(field+".mac", "%q is a multicast address, no card can have it", n.MAC)
		case macs[n.MAC]:
			v.bad(field+".mac", "another card of this guest has %s", n.MAC)
		}
		macs[n.MAC] = true
	}
	for i, text := range n.Addresses {
		addr, err := netip.ParseAddr(text)
		if err != nil || addr.Zone() != "" || addr.IsUnspecified() || addr.IsMulticast() {
			v.bad(fmt.Sprintf("%s.addresses[%d]", field, i), "%q is no IP address of a guest: write it like 192.0.2.7, without a prefix length", text)
		}
	}
	if n.Model != "" && !modelPattern.MatchString(n.Model) {
		v.bad(field+".model", "%q is no device model: write one like virtio-net-pci or e1000", n.Model)
	}
}

// ownArguments are those that the driver sets itself or that would take the
// process out of its hands, with what to do instead.
var ownArguments = map[string]string{
	"accel": "set accelerator", "enable-kvm": "set accelerator: kvm", "M": "set machine", "machine": "set machine",
	"m": "set memory", "mem-path": "memory is always a shared file", "mem-prealloc": "memory is always a shared file",
	"smp": "set vcpus", "cpu": "set cpu", "name": "set name", "uuid": "set uuid",
	"kernel": "set kernel", "initrd": "set initrd", "append": "set cmdline", "bios": "set firmware", "L": "set firmware-dir",
	"S": "the driver starts the CPUs", "incoming": "use a migration", "loadvm": "snapshots are not restored here",
	"daemonize": "the driver owns the process", "pidfile": "the driver owns the process", "runas": "the driver owns the process",
	"chroot": "the driver owns the process", "action": "the driver needs to see how the guest ends",
	"no-shutdown": "the driver needs to see how the guest ends", "no-reboot": "the driver needs to see how the guest ends",
	"snapshot": "such a disk cannot move", "D": "the log is qemu.log", "msg": "the log is qemu.log", "preconfig": "the driver starts the machine",
	"help": "it starts no guest", "h": "it starts no guest", "version": "it starts no guest", "readconfig": "write the arguments out",
}

func (v *validation) extra(args []string) {
	if len(args) > maxExtra {
		v.bad("extra-arguments", "%d are more than the %d that are allowed", len(args), maxExtra)
	}
	for i, a := range args {
		field := fmt.Sprintf("extra-arguments[%d]", i)
		if strings.ContainsRune(a, 0) {
			v.bad(field, "it holds a zero byte")
		}
		if !strings.HasPrefix(a, "-") {
			continue
		}
		if instead, own := ownArguments[strings.TrimLeft(a, "-")]; own {
			v.bad(field, "%s is not for extra arguments: %s", a, instead)
		}
	}
}
