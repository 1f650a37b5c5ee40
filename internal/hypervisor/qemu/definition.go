package qemu

import (
	"crypto/rand"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/goccy/go-yaml"
	"github.com/google/uuid"
)

// Definition is what a guest is, as its YAML file says. The zero value of an
// optional field means its default.
type Definition struct {
	Name string `yaml:"name"` // [A-Za-z0-9][A-Za-z0-9._-]{0,63}
	UUID string `yaml:"uuid,omitempty"`
	// Memory is the guest's RAM, a multiple of 1 MiB.
	Memory Size `yaml:"memory"`
	VCPUs  int  `yaml:"vcpus,omitempty"`
	// Machine is a QEMU machine type: pc, q35 or a versioned one. An alias is
	// resolved when the guest starts and stays what it was then until the
	// guest ends, wherever it moves.
	Machine string `yaml:"machine,omitempty"`
	// CPU is a QEMU CPU model with its features. By default host where the
	// CPU virtualizes and KVM is used, and qemu64 elsewhere.
	CPU         string      `yaml:"cpu,omitempty"`
	Accelerator Accelerator `yaml:"accelerator,omitempty"`

	// Firmware is an image for -bios. Without it and without Kernel the
	// machine type's own firmware boots the first disk.
	Firmware string `yaml:"firmware,omitempty"`
	Kernel   string `yaml:"kernel,omitempty"`
	Initrd   string `yaml:"initrd,omitempty"`
	Cmdline  string `yaml:"cmdline,omitempty"`

	Disks []Disk `yaml:"disks,omitempty"`
	NICs  []NIC  `yaml:"nics,omitempty"`

	// QEMU is the path of the binary, by default qemu-system-x86_64 as found
	// in the PATH.
	QEMU string `yaml:"qemu,omitempty"`
	// FirmwareDir is where an unpacked QEMU finds its own firmware files (-L).
	FirmwareDir string `yaml:"firmware-dir,omitempty"`
	// ExtraArguments are added at the end of QEMU's command line.
	ExtraArguments []string `yaml:"extra-arguments,omitempty"`
}

// Accelerator says what runs the guest's instructions.
type Accelerator string

// The accelerators.
const (
	AcceleratorAuto Accelerator = "auto" // KVM where the CPU virtualizes and /dev/kvm opens, TCG elsewhere
	AcceleratorKVM  Accelerator = "kvm"
	AcceleratorTCG  Accelerator = "tcg"
)

// Disk is a disk of a guest. Its file stays where it is when the guest moves:
// both hosts must see it under the same path.
type Disk struct {
	Path     string `yaml:"path"`
	Format   string `yaml:"format,omitempty"` // raw, qcow2
	Cache    string `yaml:"cache,omitempty"`  // none, writeback, writethrough, directsync, unsafe
	AIO      string `yaml:"aio,omitempty"`    // threads, native, io_uring
	Bus      string `yaml:"bus,omitempty"`    // virtio, ide, scsi
	ReadOnly bool   `yaml:"readonly,omitempty"`
	Serial   string `yaml:"serial,omitempty"`
}

// NIC is a network card of a guest, a tap on a bridge of the host.
type NIC struct {
	Bridge string `yaml:"bridge"`
	MAC    string `yaml:"mac,omitempty"`
	// Addresses are the guest's IP addresses behind this card, announced when
	// the guest has moved. Those that are not given are learnt.
	Addresses []string `yaml:"addresses,omitempty"`
	Model     string   `yaml:"model,omitempty"`
}

// Size is a number of bytes, written in YAML like 512MiB.
type Size int64

// MarshalYAML writes the size with the largest binary unit that divides it.
func (s Size) MarshalYAML() ([]byte, error) { return []byte(s.String()), nil }

// badSize stands for a text that is no size, until validation finds its place.
const badSize Size = -1

// UnmarshalYAML reads a size such as 512MiB or a plain number of bytes. It
// leaves it to validation to refuse another text, which knows where it stands.
func (s *Size) UnmarshalYAML(b []byte) error {
	n, err := humanize.ParseBytes(strings.Trim(strings.TrimSpace(string(b)), `"'`))
	if err != nil || n > 1<<62 {
		*s = badSize
		return nil
	}
	*s = Size(n)
	return nil
}

// String writes the size with the largest binary unit that divides it.
func (s Size) String() string {
	units := []string{"", "KiB", "MiB", "GiB", "TiB"}
	n, i := int64(s), 0
	for n != 0 && n%1024 == 0 && i < len(units)-1 {
		n, i = n/1024, i+1
	}
	return fmt.Sprintf("%d%s", n, units[i])
}

// complete fills in what the author may leave to the driver: once, when the
// guest is defined, so that a UUID and a MAC stay what they are.
func (d *Definition) complete() {
	if d.UUID == "" {
		d.UUID = uuid.NewString()
	}
	if d.VCPUs == 0 {
		d.VCPUs = 1
	}
	if d.Machine == "" {
		d.Machine = "pc"
	}
	if d.Accelerator == "" {
		d.Accelerator = AcceleratorAuto
	}
	for i := range d.Disks {
		disk := &d.Disks[i]
		setDefault(&disk.Format, "raw")
		setDefault(&disk.Cache, "none")
		setDefault(&disk.AIO, "threads")
		setDefault(&disk.Bus, "virtio")
	}
	for i := range d.NICs {
		setDefault(&d.NICs[i].Model, "virtio-net-pci")
		if d.NICs[i].MAC == "" {
			d.NICs[i].MAC = randomMAC()
		}
	}
}

func setDefault(field *string, value string) {
	if *field == "" {
		*field = value
	}
}

// randomMAC is a locally administered unicast address under QEMU's prefix.
func randomMAC() string {
	mac := net.HardwareAddr{0x52, 0x54, 0x00, 0, 0, 0}
	_, _ = rand.Read(mac[3:]) // never fails, by its documentation
	return mac.String()
}

// YAML writes the definition as it is stored.
func (d *Definition) YAML() ([]byte, error) {
	b, err := yaml.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("write the definition of guest %s: %w", d.Name, err)
	}
	return b, nil
}

// bridges are those that the network cards need, each once.
func (d *Definition) bridges() []string {
	var all []string
	for _, n := range d.NICs {
		if !slices.Contains(all, n.Bridge) {
			all = append(all, n.Bridge)
		}
	}
	return all
}
