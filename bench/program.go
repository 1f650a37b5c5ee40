package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
	"github.com/lmctl/lmctl/internal/lab"
)

// clockTick is how often an idle guest's clock ticks: the least that a downtime
// can be told from.
const clockTick = time.Millisecond

// program is what runs in a guest.
type program interface {
	// define makes what the guest boots from, and its definition.
	define(b *bed, name string, memory int64) (*qemu.Definition, error)
	// spec is the guest for libvirt, which the lab makes; nil for none.
	spec(memory int64) *lab.GuestSpec
	// boot waits until the guest does what it is to do, and returns where in its
	// memory file the 32-bit count is that goes on with its clock.
	boot(ctx context.Context, p place, memory int64) (counter int64, err error)
	// check is the guest's own verdict on its memory.
	check(ctx context.Context, p place) error
}

// flatProgram is a flat guest, on KVM wherever that opens.
type flatProgram struct{ config flat.Config }

func (f flatProgram) define(b *bed, name string, memory int64) (*qemu.Definition, error) {
	image, err := f.config.Image()
	if err != nil {
		return nil, err
	}
	disk := filepath.Join(b.lab.Storage(), name+".img")
	if err := os.WriteFile(disk, image, 0o600); err != nil {
		return nil, fmt.Errorf("flat guest: %w", err)
	}
	accelerator := qemu.AcceleratorKVM
	if fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		accelerator = qemu.AcceleratorTCG
	} else if err := unix.Close(fd); err != nil {
		return nil, fmt.Errorf("flat guest: close /dev/kvm: %w", err)
	}
	return &qemu.Definition{
		Name: name, Memory: qemu.Size(memory), Accelerator: accelerator,
		Disks: []qemu.Disk{{Path: disk, Format: "raw", Bus: "ide"}},
	}, nil
}

func (f flatProgram) spec(memory int64) *lab.GuestSpec {
	s := &lab.GuestSpec{Kind: lab.Flat, Memory: memory, WorkingSet: int64(f.config.Pages) * flat.PageSize, DirtyRate: lab.Unbounded}
	if f.config.Rate != flat.Unbounded {
		s.DirtyRate = f.config.Rate * flat.PageSize
	}
	return s
}

// bootPoll is how often the memory of a booting flat guest is looked at, which
// tells nobody when it has booted.
const bootPoll = 5 * time.Millisecond

func (f flatProgram) boot(ctx context.Context, p place, _ int64) (int64, error) {
	mem, err := os.Open(p.memory)
	if err != nil {
		return 0, fmt.Errorf("flat guest: %w", err)
	}
	defer mem.Close()
	tick := time.NewTicker(bootPoll)
	defer tick.Stop()
	for {
		s, err := flat.ReadState(mem)
		if err != nil {
			return 0, err
		}
		// A writer has been everywhere once, so that all of its pages exist.
		if s.Booted && s.Counter > 0 && (f.config.Rate == 0 || s.Pass > 0) {
			return flat.CounterAddr, s.Err()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, fmt.Errorf("flat guest: it does not boot: %w", ctx.Err())
		}
	}
}

func (f flatProgram) check(_ context.Context, p place) error {
	mem, err := os.Open(p.memory)
	if err != nil {
		return fmt.Errorf("flat guest: %w", err)
	}
	_, err = f.config.Check(mem, false)
	return errors.Join(err, mem.Close())
}

// linuxProgram is a Linux guest, on KVM where the CPU virtualizes.
type linuxProgram struct{ settings control.Settings }

func (l linuxProgram) define(b *bed, name string, memory int64) (*qemu.Definition, error) {
	boot, err := b.linux()
	if err != nil {
		return nil, err
	}
	s := l.settings
	s.Addresses = b.addresses()
	nic := qemu.NIC{Bridge: lab.Bridge}
	for _, a := range s.Addresses {
		nic.Addresses = append(nic.Addresses, a.Addr().String())
	}
	return &qemu.Definition{
		Name: name, Memory: qemu.Size(memory), Kernel: boot.Kernel, Initrd: boot.Initrd,
		Cmdline: linux.Console + " " + s.Cmdline(),
		NICs:    []qemu.NIC{nic},
	}, nil
}

// spec is nil: the lab's own Linux guests have a clock that is too slow.
func (l linuxProgram) spec(int64) *lab.GuestSpec { return nil }

func (l linuxProgram) boot(ctx context.Context, p place, memory int64) (int64, error) {
	c, err := dialConsole(ctx, p.console)
	if err != nil {
		return 0, err
	}
	defer c.close()
	st, err := c.ready(ctx)
	if err != nil {
		return 0, fmt.Errorf("the Linux guest does not boot: %w", err)
	}
	if st.Clock.TickGPA == 0 {
		return 0, errors.New("the Linux guest does not know where its tick is")
	}
	return fileOffset(memory, st.Clock.TickGPA), nil
}

func (l linuxProgram) check(ctx context.Context, p place) error {
	c, err := dialConsole(ctx, p.console)
	if err != nil {
		return err
	}
	defer c.close()
	st, err := c.do(ctx, control.Request{Do: control.CheckAll})
	if err != nil {
		return err
	}
	if !st.OK {
		return fmt.Errorf("the Linux guest has found: %v", st.Problems)
	}
	return nil
}

// fileOffset is where guest physical address gpa of a machine of type pc is in
// its memory file: with 3.5 GiB and more, what is above 3 GiB is above 4 GiB
// (QEMU, hw/i386/pc_piix.c).
func fileOffset(memory int64, gpa uint64) int64 {
	const split, low, high = 0xe0000000, 0xc0000000, 1 << 32
	if memory >= split && gpa >= high {
		return int64(gpa) - high + low
	}
	return int64(gpa)
}

// firstGuest to lastGuest are numbers of guests in the lab's networks that the
// lab itself gives to nobody as long as it has few guests.
const firstGuest, lastGuest = 201, 250

// addresses are those that no other guest of this bench has had for long.
func (b *bed) addresses() []netip.Prefix {
	g := lab.Guest{Number: firstGuest + b.guests%(lastGuest-firstGuest+1)}
	b.guests++
	return g.Addresses()
}
