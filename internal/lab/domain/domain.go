// Package domain writes libvirt's XML for the guests of a lab.
//
// A Guest is what runs: its name, memory, disk and network card. A Shape is how
// it is built: machine, buses, cache modes, memory backing and devices. Cases
// lists shapes that between them have everything that a migration may meet.
package domain

import (
	"fmt"
	"strings"

	"libvirt.org/go/libvirtxml"
)

// Backing is what a guest's memory is made of.
type Backing string

// The backings. All but Private can be shared with others than QEMU.
const (
	File    Backing = "file"  // a file in libvirt's memory_backing_dir
	Memfd   Backing = "memfd" // a file that has no name
	Private Backing = "private"
)

// Shape is how a domain is built. Its zero value is a guest on an i440FX machine
// with shared memory in a file, a raw disk without host cache, and nothing that
// it does not need.
type Shape struct {
	Machine string  `json:"machine,omitempty"` // pc (the default), q35, or a version of one
	Backing Backing `json:"backing,omitempty"` // File if empty
	Nodes   int     `json:"nodes,omitempty"`   // NUMA nodes with a memory backend each; none if 0

	Bus    string `json:"bus,omitempty"`    // virtio (the default), scsi, ide or sata
	Format string `json:"format,omitempty"` // raw (the default) or qcow2
	Cache  string `json:"cache,omitempty"`  // none (the default), writeback and so on
	AIO    string `json:"aio,omitempty"`    // native, threads or io_uring; QEMU's choice if empty

	UEFI     bool `json:"uefi,omitempty"` // firmware in flash, its variables in a file of its own
	Balloon  bool `json:"balloon,omitempty"`
	RNG      bool `json:"rng,omitempty"`
	Watchdog bool `json:"watchdog,omitempty"`
	Channel  bool `json:"channel,omitempty"` // the guest agent's
	VGA      bool `json:"vga,omitempty"`     // with VNC

	// Transient domains have no definition: they are gone when they end.
	Transient bool `json:"transient,omitempty"`
}

// Guest is what runs in a domain.
type Guest struct {
	Name, UUID string
	KVM        bool   // TCG otherwise
	Emulator   string // path; DefaultEmulator if empty
	Memory     int64  // bytes, a multiple of 1 MiB
	VCPUs      int
	Disk       string // path as the hosts see it
	// Kernel, Initrd and Cmdline boot the guest; its disk does if they are
	// empty.
	Kernel, Initrd, Cmdline string
	Bridge, MAC             string // of its network card, if it has one
	// Console is the file that has what the guest writes to its serial port.
	Console string
}

// DefaultEmulator is the machine's own QEMU.
const DefaultEmulator = "/usr/bin/qemu-system-x86_64"

// Firmware for UEFI, and the variables that it starts with: Debian's package
// ovmf.
const (
	FirmwareCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	FirmwareVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

// XML writes a domain's definition.
func (s Shape) XML(g Guest) (string, error) {
	if err := s.validate(g); err != nil {
		return "", fmt.Errorf("domain %s: %w", g.Name, err)
	}
	d := libvirtxml.Domain{
		Type: "qemu", Name: g.Name, UUID: g.UUID,
		Memory:        &libvirtxml.DomainMemory{Value: uint(g.Memory >> 20), Unit: "MiB"},
		VCPU:          &libvirtxml.DomainVCPU{Placement: "static", Value: uint(g.VCPUs)},
		MemoryBacking: s.backing(), CPU: s.topology(g), OS: s.os(g),
		Features: &libvirtxml.DomainFeatureList{ACPI: &libvirtxml.DomainFeature{}, APIC: &libvirtxml.DomainFeatureAPIC{}},
		// Whoever runs it is to see how it ended.
		OnPoweroff: "destroy", OnReboot: "restart", OnCrash: "destroy",
		Devices: s.devices(g),
	}
	if g.KVM {
		d.Type = "kvm"
	}
	text, err := d.Marshal()
	if err != nil {
		return "", fmt.Errorf("domain %s: %w", g.Name, err)
	}
	return text, nil
}

func (s Shape) validate(g Guest) error {
	switch {
	case g.Memory <= 0 || g.Memory%(1<<20) != 0:
		return fmt.Errorf("%d bytes of memory: not a multiple of 1 MiB", g.Memory)
	case g.VCPUs < 1:
		return fmt.Errorf("%d CPUs", g.VCPUs)
	case s.Nodes < 0 || s.Nodes > 0 && g.Memory%(int64(s.Nodes)<<20) != 0:
		return fmt.Errorf("%d NUMA nodes with %d bytes of memory: not a multiple of 1 MiB each", s.Nodes, g.Memory)
	case s.Backing != "" && s.Backing != File && s.Backing != Memfd && s.Backing != Private:
		return fmt.Errorf("no such memory backing: %q", s.Backing)
	}
	return nil
}

func (s Shape) backing() *libvirtxml.DomainMemoryBacking {
	b := s.Backing
	if b == "" {
		b = File
	}
	if b == Private {
		return nil
	}
	m := &libvirtxml.DomainMemoryBacking{
		MemorySource: &libvirtxml.DomainMemorySource{Type: "file"},
		MemoryAccess: &libvirtxml.DomainMemoryAccess{Mode: "shared"},
	}
	if b == Memfd {
		m.MemorySource.Type = "memfd"
	}
	return m
}

// topology gives each NUMA node its share of memory and CPUs.
func (s Shape) topology(g Guest) *libvirtxml.DomainCPU {
	if s.Nodes == 0 {
		return nil
	}
	numa := &libvirtxml.DomainNuma{}
	for i := range s.Nodes {
		id := uint(i)
		cell := libvirtxml.DomainCell{ID: &id, Memory: uint(g.Memory>>20) / uint(s.Nodes), Unit: "MiB"}
		var cpus []string
		for c := i; c < g.VCPUs; c += s.Nodes {
			cpus = append(cpus, fmt.Sprint(c))
		}
		cell.CPUs = strings.Join(cpus, ",")
		numa.Cell = append(numa.Cell, cell)
	}
	return &libvirtxml.DomainCPU{Numa: numa}
}

func (s Shape) os(g Guest) *libvirtxml.DomainOS {
	machine := s.Machine
	if machine == "" {
		machine = "pc"
	}
	os := &libvirtxml.DomainOS{
		Type:   &libvirtxml.DomainOSType{Arch: "x86_64", Machine: machine, Type: "hvm"},
		Kernel: g.Kernel, Initrd: g.Initrd, Cmdline: g.Cmdline,
	}
	if g.Kernel == "" {
		os.BootDevices = []libvirtxml.DomainBootDevice{{Dev: "hd"}}
	}
	if s.UEFI {
		os.Loader = &libvirtxml.DomainLoader{Path: FirmwareCode, Readonly: "yes", Type: "pflash"}
		os.NVRam = &libvirtxml.DomainNVRam{Template: FirmwareVars, NVRam: NVRAM(g.Name)}
	}
	return os
}

// NVRAM is where a host keeps the variables of a domain's UEFI.
func NVRAM(name string) string { return "/var/lib/libvirt/qemu/nvram/" + name + "_VARS.fd" }

// Console is where a host keeps what a domain wrote to its serial port.
func Console(name string) string { return "/var/log/libvirt/qemu/" + name + "-console.log" }
