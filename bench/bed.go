package bench

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
	"github.com/lmctl/lmctl/internal/lab"
)

// bed is the lab with all that is needed to run guests in it, managed by agents
// or by nobody.
type bed struct {
	lab    *lab.Lab
	hosts  [2]string
	guests int
	// Drivers of the bench's own start the guests that no agent manages, with
	// the command line that an agent's driver gives them.
	drivers map[string]*qemu.Driver
	boot    func(context.Context) (linux.Boot, error)
	ctx     context.Context // Run's
}

func newBed(ctx context.Context, l *lab.Lab, boot func(context.Context) (linux.Boot, error)) (*bed, error) {
	hosts := l.Hosts()
	if len(hosts) < 2 {
		return nil, fmt.Errorf("bench: the lab has %d hosts, not 2", len(hosts))
	}
	b := &bed{lab: l, hosts: [2]string(hosts[:2]), drivers: make(map[string]*qemu.Driver), boot: boot, ctx: ctx}
	if l.Hypervisor() != lab.QEMU {
		return b, nil // all guests are the agents'
	}
	for _, host := range b.hosts {
		dir := filepath.Join(l.HostDir(host), "bench")
		err := l.In(host, func() error { // a driver works where it was made
			d, err := qemu.New(qemu.Config{
				StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"),
				MemoryDir: b.ownMemory(host),
			})
			b.drivers[host] = d
			return err
		})
		if err != nil {
			delete(b.drivers, host)
			return nil, errors.Join(fmt.Errorf("bench: %w", err), b.close())
		}
	}
	return b, nil
}

// ownMemory is where the bench's own guests on a host have their memory.
func (b *bed) ownMemory(host string) string { return filepath.Join(b.lab.MemoryDir(host), "bench") }

// memoryFile is where a driver keeps a guest's RAM; see package qemu.
func memoryFile(dir, uuid string) string { return filepath.Join(dir, uuid+".ram") }

// definition makes what a guest boots from, and defines it for a driver of QEMU.
func (b *bed) definition(name string, w Workload) ([]byte, error) {
	def, err := w.program.define(b, name, w.Memory)
	if err != nil {
		return nil, err
	}
	def.UUID = uuid.NewString()
	return def.YAML()
}

// linux is what Linux guests boot from.
func (b *bed) linux() (linux.Boot, error) {
	if b.boot == nil {
		return linux.Boot{}, errors.New("bench: nothing to boot Linux guests from")
	}
	return b.boot(b.ctx)
}

// close lets go of the guests; they end with the lab.
func (b *bed) close() error {
	var errs []error
	for _, d := range b.drivers {
		errs = append(errs, d.Close())
	}
	return errors.Join(errs...)
}

// patience bounds what should take no time.
const patience = 20 * time.Second

// await waits until a guest of the bench's own is in one of the states.
func (b *bed) await(ctx context.Context, host, name string, states ...hypervisor.State) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for i := range b.drivers[host].Watch(ctx) {
		if i.Name != name {
			continue
		}
		for _, s := range states {
			if i.State == s {
				return nil
			}
		}
	}
	return fmt.Errorf("guest %s on %s does not become %s", name, host, states[0])
}

// otherHost is the index of the other one of two hosts.
func otherHost(at int) int { return 1 - at }
