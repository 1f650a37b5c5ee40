package agent

import (
	"errors"
	"fmt"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/libvirt"
	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
	"github.com/lmctl/lmctl/internal/ledger"
)

// qemuDriver is the embedded hypervisor.
type qemuDriver struct{ *qemu.Driver }

func (d qemuDriver) Source(name string) (hypervisor.Source, error) {
	g, err := d.Driver.Source(name)
	if err != nil {
		return nil, err
	}
	return g, nil
}

func (d qemuDriver) ShellOf(name string) (hypervisor.Shell, bool, error) {
	s, ran, err := d.Driver.ShellOf(name)
	if err != nil {
		return nil, false, err
	}
	return s, ran, nil
}

// newDriver makes the driver that the configuration asks for.
func (a *Agent) newDriver() (hypervisor.Driver, error) {
	if a.foreign() {
		return libvirt.New(libvirt.Config{URI: a.cfg.Libvirt.URI, RunDir: a.cfg.RunDir, MemoryReserve: int64(a.cfg.MemoryReserve), Log: a.log})
	}
	d, err := qemu.New(qemu.Config{
		StateDir: a.cfg.StateDir, RunDir: a.cfg.RunDir, MemoryDir: a.cfg.MemoryDir,
		MemoryReserve: int64(a.cfg.MemoryReserve), Log: a.log,
	})
	if err != nil {
		return nil, err
	}
	return qemuDriver{d}, nil
}

// copyOf says what this host has of a guest, as the ledger's rules see it. A
// guest that is stopped for a reason of its own, or by an operator, counts as
// running: a migration has nothing to do with that.
func (a *Agent) copyOf(name string) (c ledger.Copy, shell bool) {
	info, err := a.driver.Get(name)
	switch {
	case err == nil && info.State == hypervisor.StateUnreachable, err != nil && !a.connected():
		return ledger.UnknownCopy, false
	case err != nil || info.PID == 0:
		return ledger.NoCopy, false
	case info.State == hypervisor.StateIncoming:
		return ledger.PausedCopy, true
	case info.Suspended || info.State == hypervisor.StateMigrating:
		return ledger.PausedCopy, false
	}
	return ledger.RunningCopy, false
}

// cleanTrackers takes out of the adopted hypervisors what the tracker of an
// agent that died may have left there.
func (a *Agent) cleanTrackers() {
	for _, info := range a.driver.List() {
		if info.PID == 0 || info.State == hypervisor.StateIncoming || info.State == hypervisor.StateUnreachable {
			continue
		}
		if err := a.cleanTracker(info.Name); err != nil && !errors.Is(err, dirtymap.ErrUnsupported) {
			a.log.Warn("a tracker may be left in the guest's process", "guest", info.Name, "error", err)
		}
	}
}

func (a *Agent) cleanTracker(name string) error {
	g, err := a.driver.Source(name)
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	return errors.Join(dirtymap.CleanUp(g.Process()), g.Close())
}
