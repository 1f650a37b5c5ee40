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
	text, err := os.ReadFile(filepath.Join(dir, e.Name(), "definition.yaml"))
	if err != nil {
		return err
	}
	def, err := ParseDefinition(text)
	if err != nil {
		return err
	}
	if def.Name != e.Name() {
		return fmt.Errorf("its folder has the definition of guest %s", def.Name)
	}
	v := d.newVM(def)
	if err := readJSON(v.files.record(), &v.rec); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := d.add(v); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, adoptTimeout)
	defer cancel()
	return v.adopt(ctx)
}

func (v *vm) adopt(ctx context.Context) error {
	var id processID
	err := readJSON(v.files.process(), &id)
	if errors.Is(err, fs.ErrNotExist) {
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
		return v.adoptRunning(ctx, v.attach(proc, mon))
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

// adoptLate takes in a guest whose QEMU answers at last.
func (v *vm) adoptLate(ctx context.Context, inst *instance) {
	if err := v.adoptRunning(ctx, inst); err != nil {
		v.d.log.Error("adopt the guest", "guest", v.def.Name, "error", err)
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
		end := &End{Cause: EndVanished, Detail: why, At: time.Now()}
		if err := v.updateRecord(func(r *record) { r.End = end }); err != nil {
			return err
		}
	}
	v.setState(StateStopped)
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
	_, statErr := os.Stat(v.files.resumed())
	if incoming && (runstate == "running" || statErr == nil) {
		// It was told to run, and the agent died before it noted that.
		if err := v.settleIn(ctx, inst); err != nil {
			return err
		}
	}
	if runstate == "prelaunch" && !incoming {
		return v.end(ctx, End{Cause: EndFailed, Detail: "the agent ended while the guest was being started"})
	}
	if runstate == "running" {
		v.learn()
	}
	v.refreshBlind(ctx, inst)
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
