package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
)

// diskSize is the length of the disk that is made for a Linux guest.
const diskSize = 16 << 20

// makeDisk makes a guest's disk: what a flat guest boots from, or an empty one.
func (l *Lab) makeDisk(ctx context.Context, g Guest) error {
	var content []byte
	if g.Kind == Flat {
		var err error
		if content, err = g.flatConfig().Image(); err != nil {
			return err
		}
	}
	path := l.diskOf(g)
	if err := writeWhole(path, content); err != nil {
		return err
	}
	if err := os.Truncate(path, max(diskSize, int64(len(content)))); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if g.Shape.Format == "qcow2" {
		if err := toQcow2(ctx, path); err != nil {
			return err
		}
	}
	return l.forQEMU(path)
}

// define makes a guest's disk and its definition.
func (l *Lab) define(ctx context.Context, g *Guest, boot linux.Boot) ([]byte, error) {
	if l.Hypervisor() == Libvirt {
		return l.defineDomain(ctx, g, boot)
	}
	d := qemu.Definition{
		Name: g.Name, UUID: g.UUID, Memory: qemu.Size(g.Memory), VCPUs: g.VCPUs, Machine: g.Machine,
		Accelerator: qemu.Accelerator(g.Accelerator), QEMU: g.QEMU, FirmwareDir: g.FirmwareDir,
	}
	disk := qemu.Disk{Path: l.diskOf(*g), Format: "raw", Cache: "none"}
	if g.Kind == Flat {
		disk.Bus = "ide"
		// It is what flat guests are for; where there is no KVM they run all
		// the same.
		if d.Accelerator == "" && unix.Access("/dev/kvm", unix.R_OK|unix.W_OK) == nil {
			d.Accelerator = qemu.AcceleratorKVM
		}
	} else {
		d.Kernel, d.Initrd = boot.Kernel, boot.Initrd
		d.Cmdline = linux.Console + " " + g.settings().Cmdline()
		nic := qemu.NIC{Bridge: Bridge, MAC: g.MAC}
		for _, a := range g.Addresses() {
			nic.Addresses = append(nic.Addresses, a.Addr().String())
		}
		d.NICs = []qemu.NIC{nic}
	}
	if g.Disk == "" {
		if err := l.makeDisk(ctx, *g); err != nil {
			return nil, err
		}
	}
	d.Disks = []qemu.Disk{disk}
	return d.YAML()
}

// diskOf is a guest's disk: the one that it was given, or its own.
func (l *Lab) diskOf(g Guest) string {
	if g.Disk != "" {
		return g.Disk
	}
	return l.ownDisk(g)
}

func (l *Lab) ownDisk(g Guest) string {
	format := g.Shape.Format
	if format == "" {
		format = "raw"
	}
	return filepath.Join(l.Storage(), g.Name+"."+format)
}

// definitionFile is where the lab keeps a guest's definition.
func (l *Lab) definitionFile(name string) string {
	if l.Hypervisor() == Libvirt {
		return filepath.Join(l.dir, "guests", name+".xml")
	}
	return filepath.Join(l.dir, "guests", name+".yaml")
}
