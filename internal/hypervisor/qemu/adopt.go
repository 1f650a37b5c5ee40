package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// adoptTimeout bounds the meeting with one QEMU.
const adoptTimeout = 30 * time.Second

// Adopt finds the guests of this host: those that an earlier agent left
// running, whose ends it now records if they ended meanwhile, and those that
// are only defined. What is left of guests that are no longer here is removed.
// It is called once, after New. A guest that cannot be adopted does not keep
// the others from it: the error joins all.
func (d *Driver) Adopt(ctx context.Context) error {
	dir := filepath.Join(d.cfg.StateDir, "guests")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("adopt guests: %w", err)
	}
	errs := make([]error, len(entries))
	var group errgroup.Group
	group.SetLimit(16)
	for i, e := range entries {
		group.Go(func() error {
			if err := d.adoptEntry(ctx, dir, e); err != nil {
				errs[i] = fmt.Errorf("adopt guest %s: %w", e.Name(), err)
			}
			return nil
		})
	}
	if err := errors.Join(group.Wait(), errors.Join(errs...)); err != nil {
		return err // what seems to be nobody's may be theirs
	}
	return d.sweep()
}

func (d *Driver) adoptEntry(ctx context.Context, dir string, e fs.DirEntry) error {
	if strings.HasPrefix(e.Name(), temporaryPrefix) {
		return os.RemoveAll(filepath.Join(dir, e.Name()))
	}
	if !e.IsDir() || !ValidName(e.Name()) {
		return nil // not ours
	}
	def, err := readDefinition(dir, e.Name())
	if err != nil {
		// Its process may run: the name is taken, and nothing may be done to it.
		v := d.newVM(&Definition{Name: e.Name()})
		v.state = hypervisor.StateUnreachable
		return errors.Join(err, d.add(v))
	}
	v := d.newVM(def)
	v.state = hypervisor.StateUnreachable // until it is known how it is
	if err := d.add(v); err != nil {
		return err
	}
	if err := readJSON(v.files.record(), &v.rec); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, adoptTimeout)
	defer cancel()
	return v.adopt(ctx)
}

func readDefinition(dir, name string) (*Definition, error) {
	text, err := os.ReadFile(filepath.Join(dir, name, "definition.yaml"))
	if err != nil {
		return nil, err
	}
	def, err := ParseDefinition(text)
	if err != nil {
		return nil, err
	}
	if def.Name != name {
		return nil, fmt.Errorf("its folder has the definition of guest %s", def.Name)
	}
	return def, nil
}

func (v *vm) adopt(ctx context.Context) error {
	var id processID
	err := readJSON(v.files.process(), &id)
	if errors.Is(err, fs.ErrNotExist) {
		if err := v.endUnnoted(ctx); err != nil {
			return err
		}
		return v.adoptStopped("")
	}
	if err != nil {
		return err
	}
	proc, err := findProcess(id)
	if errors.Is(err, errGone) {
		return v.adoptStopped(v.whyGone(id))
	}
	if err != nil {
		return err
	}
	mon, err := dialMonitor(ctx, v.files.qmp())
	if err == nil {
		inst := v.attachAdopted(proc, mon)
		if err = v.adoptRunning(ctx, inst); err != nil {
			v.d.wg.Go(func() { v.adoptLate(v.d.ctx, inst) })
		}
		return err
	}
	if ctx.Err() == nil {
		// The connection broke: it may be about to exit.
		wait, cancel := context.WithTimeout(ctx, quitTimeout)
		defer cancel()
		select {
		case <-proc.done:
			return errors.Join(v.adoptStopped("QEMU "+proc.exit.String()), proc.forget())
		case <-wait.Done():
		}
	}
	v.d.log.Warn("QEMU lives but does not answer", "guest", v.def.Name, "process", id.PID, "error", err)
	v.attachUnmet(proc)
	return nil
}

// adoptLate takes in a guest whose QEMU answers at last. What keeps it from
// that may pass.
func (v *vm) adoptLate(ctx context.Context, inst *instance) {
	v.mu.Lock()
	already := inst.adopting
	inst.adopting = true
	v.mu.Unlock()
	for said := ""; !already; {
		err := v.adoptRunning(ctx, inst)
		if err == nil || ctx.Err() != nil {
			return
		}
		if err.Error() != said {
			said = err.Error()
			v.d.log.Error("adopt the guest", "guest", v.def.Name, "error", err)
		}
		timer := time.NewTimer(redialPause)
		select {
		case <-timer.C:
			continue
		case <-inst.ended:
		case <-ctx.Done():
		}
		timer.Stop()
		return
	}
}

func (v *vm) whyGone(id processID) string {
	if boot, err := bootID(); err == nil && boot != id.Boot {
		return "the host was restarted"
	}
	return "QEMU ended while no agent watched it"
}

// adoptStopped takes in a guest without a process. Where none should be
// missing, that is its end.
func (v *vm) adoptStopped(why string) error {
	if err := v.cleanRun(); err != nil {
		return err
	}
	if v.rec.Released || v.rec.Incoming {
		defer v.d.remove(v)
		return v.erase()
	}
	if v.rec.Run != nil && v.rec.End == nil {
		if why == "" {
			why = "its run folder is gone; the host was restarted"
		}
		end := &hypervisor.End{Cause: hypervisor.EndVanished, Detail: why, At: time.Now()}
		if err := v.updateRecord(func(r *record) { r.End = end }); err != nil {
			return err
		}
	}
	v.setState(hypervisor.StateStopped)
	return nil
}

// adoptRunning takes in a guest whose QEMU lives.
func (v *vm) adoptRunning(ctx context.Context, inst *instance) error {
	v.mu.Lock()
	released, incoming, end := v.rec.Released, v.rec.Incoming, v.rec.End
	v.mu.Unlock()
	switch {
	case released:
		return v.release(ctx)
	case end != nil:
		// The earlier agent was about to end it, or had not yet run it.
		return v.end(ctx, *end)
	}
	runstate, err := v.queryStatus(ctx, inst)
	if err != nil {
		return err
	}
	if _, err := os.Stat(v.files.suspension()); err == nil && !incoming {
		v.change(func() { inst.suspended = true })
	}
	if incoming && hasRun(runstate) {
		// It was told to run, and the agent died before it noted that. One that
		// was about to be told stays a shell: see ShellOf.
		if err := v.settleIn(ctx, inst); err != nil {
			return err
		}
	}
	if runstate == "prelaunch" && !incoming {
		return v.end(ctx, hypervisor.End{Cause: hypervisor.EndFailed, Detail: "the agent ended while the guest was being started"})
	}
	if runstate == "running" {
		v.learn()
	}
	v.mu.Lock()
	inst.unmet = false
	v.mu.Unlock()
	v.refreshBlind(ctx, inst)
	if v.info().State == hypervisor.StateUnreachable {
		return errors.New("QEMU has stopped answering")
	}
	return nil
}

// sweep removes run folders and memory files that belong to no guest.
func (d *Driver) sweep() error {
	d.mu.Lock()
	runs, memories := make(map[string]bool), make(map[string]bool)
	for _, v := range d.guests {
		runs[v.def.Name] = true
		memories[filepath.Base(v.files.memory)] = true
	}
	d.mu.Unlock()
	return errors.Join(
		sweepDir(filepath.Join(d.cfg.RunDir, "guests"), func(name string) bool { return !runs[name] }),
		sweepDir(d.cfg.MemoryDir, func(name string) bool { return strings.HasSuffix(name, memorySuffix) && !memories[name] }),
	)
}

func sweepDir(dir string, stale func(name string) bool) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if stale(e.Name()) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
