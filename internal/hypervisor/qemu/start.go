package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// startTimeout bounds a QEMU's way from its start to its first word on QMP.
const startTimeout = 60 * time.Second

// Start runs a stopped guest. When it returns nil the CPUs run. An error
// carries QEMU's own words where it had any, and nothing of the attempt is
// left but the record.
func (d *Driver) Start(ctx context.Context, name string) error {
	v, err := d.lookup(name)
	if err != nil {
		return err
	}
	done, err := v.begin("start", hypervisor.StateStopped)
	if err != nil {
		return err
	}
	defer done()
	if err := v.start(ctx); err != nil {
		return fmt.Errorf("start guest %s: %w", name, err)
	}
	return nil
}

func (v *vm) start(ctx context.Context) error {
	run, err := v.d.resolve(ctx, v.def)
	if err != nil {
		return err
	}
	err = v.updateRecord(func(r *record) {
		*r = record{Run: run, End: &hypervisor.End{Cause: hypervisor.EndFailed, At: time.Now()}}
	})
	if err != nil {
		return err
	}
	inst, err := v.launch(ctx, run, false)
	if err != nil {
		v.recordFailure(err)
		return err
	}
	if err := v.updateRecord(func(r *record) { r.End = nil }); err != nil {
		return v.abandon(inst, err)
	}
	if err := v.monitor(inst).run(ctx, "cont", nil, nil); err != nil {
		return v.abandon(inst, err)
	}
	v.learn()
	v.refresh(ctx, inst)
	return nil
}

// resolve chooses what the definition leaves open, for this run of the guest.
func (d *Driver) resolve(ctx context.Context, def *Definition) (*runRecord, error) {
	bin, err := d.bins.get(ctx, def)
	if err != nil {
		return nil, err
	}
	machine, err := bin.resolve(def.Machine)
	if err != nil {
		return nil, err
	}
	accel, cpu, err := accelerate(def)
	if err != nil {
		return nil, err
	}
	return &runRecord{
		Machine: machine, Accelerator: accel, CPU: cpu,
		QEMU: bin.Path, FirmwareDir: bin.Firmware, Version: bin.Version, Started: time.Now(),
	}, nil
}

func (v *vm) recordFailure(cause error) {
	end := &hypervisor.End{Cause: hypervisor.EndFailed, Detail: cause.Error(), At: time.Now()}
	if err := v.updateRecord(func(r *record) { r.End = end }); err != nil {
		v.d.log.Error("record a failed start", "guest", v.def.Name, "error", err)
	}
}

// abandon ends a QEMU that never ran its guest, and waits for it.
func (v *vm) abandon(inst *instance, cause error) error {
	v.retire(inst, hypervisor.End{Cause: hypervisor.EndFailed, Detail: cause.Error()})
	select {
	case <-inst.ended:
		return cause
	case <-v.d.ctx.Done():
		return errors.Join(cause, errors.New("the driver was closed"))
	}
}

// launch starts a QEMU whose CPUs do not run yet, and watches it.
func (v *vm) launch(ctx context.Context, run *runRecord, incoming bool) (_ *instance, err error) {
	l := launch{def: v.def, run: run, files: v.files, incoming: incoming}
	if l.devices, err = blockDevices(v.def); err != nil {
		return nil, err
	}
	argv, err := l.arguments()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.cleanRun())
		}
	}()
	if err := v.prepareRun(); err != nil {
		return nil, err
	}
	taps, err := v.d.createTaps(v.def, !incoming)
	if err != nil {
		return nil, err
	}
	proc, offset, err := v.spawn(argv, taps)
	if err = errors.Join(err, closeAll(taps)); err != nil {
		return nil, err
	}
	v.d.ownScope(ctx, v.def.Name, proc.id.PID)
	return v.meet(ctx, proc, offset, incoming)
}

// prepareRun makes the run folder and the empty memory file.
func (v *vm) prepareRun() error {
	if err := v.cleanRun(); err != nil {
		return err
	}
	if err := os.Mkdir(v.files.run, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(v.files.memory, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("create the memory file: %w", err)
	}
	err = f.Truncate(int64(v.def.Memory))
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("create the memory file: %w", err)
	}
	return nil
}

// spawn starts QEMU with its sockets, which we make and listen on ourselves:
// there is no moment at which they are not yet there.
func (v *vm) spawn(argv []string, taps []*os.File) (_ *process, offset int64, err error) {
	var own []*os.File
	defer func() { err = errors.Join(err, closeAll(own)) }()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, 0, err
	}
	own = append(own, null)
	log, err := os.OpenFile(v.files.log(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, 0, err
	}
	own = append(own, log)
	info, err := log.Stat()
	if err != nil {
		return nil, 0, err
	}
	list := []*os.File{null, log, log}
	for _, path := range []string{v.files.qmp(), v.files.observer(), v.files.console()} {
		l, err := listenUnix(path)
		if err != nil {
			return nil, 0, err
		}
		own = append(own, l)
		list = append(list, l)
	}
	proc, err := spawn(argv[0], argv, append(list, taps...))
	if err != nil {
		return nil, 0, fmt.Errorf("run %s: %w", argv[0], err)
	}
	if err := writeJSON(v.files.process(), proc.id, true); err != nil {
		return nil, 0, errors.Join(err, endUnwatched(proc))
	}
	return proc, info.Size(), nil
}

// meet connects to a fresh QEMU. It owns proc.
func (v *vm) meet(ctx context.Context, proc *process, offset int64, incoming bool) (*instance, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	mon, err := dialMonitor(ctx, v.files.qmp())
	if err != nil {
		return nil, v.explain(ctx, proc, offset, err)
	}
	inst := v.attach(proc, mon)
	v.mu.Lock()
	inst.offset = offset
	v.mu.Unlock()
	state := hypervisor.StateStarting
	if incoming {
		state = hypervisor.StateIncoming
	}
	v.setState(state)
	return inst, nil
}

// explain says why a QEMU did not come up, and ends it.
func (v *vm) explain(ctx context.Context, proc *process, offset int64, cause error) error {
	if ctx.Err() == nil {
		// The connection broke: QEMU is about to exit, for a reason of its own.
		timer := time.NewTimer(quitTimeout)
		defer timer.Stop()
		select {
		case <-proc.done:
			cause = fmt.Errorf("QEMU %s", proc.exit)
		case <-timer.C:
		}
	}
	if err := endUnwatched(proc); err != nil {
		cause = errors.Join(cause, err)
	}
	if words := logTail(v.files.log(), offset); words != "" {
		cause = fmt.Errorf("%w: %s", cause, words)
	}
	return cause
}

// endUnwatched kills a process that is not yet any guest's.
func endUnwatched(proc *process) error {
	ctx, cancel := context.WithTimeout(context.Background(), quitTimeout)
	defer cancel()
	return errors.Join(proc.kill(ctx), proc.forget())
}

// listenUnix makes a listening socket whose path may be longer than an address
// may. The socket file stays when the descriptor is closed.
func listenUnix(path string) (_ *os.File, err error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	dir, base, err := openParent(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: shortPath(dir, base), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err = errors.Join(err, l.Close()); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	// QEMU expects a blocking descriptor and sets what it wants itself.
	if err := unix.SetNonblock(int(f.Fd()), false); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
