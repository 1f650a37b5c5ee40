package qemu

import (
	"context"
	"errors"
	"time"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// instance is a living QEMU of a guest.
type instance struct {
	proc  *process
	ended chan struct{} // closed when its end is recorded and nothing of it is left

	// Guarded by the vm's mu.
	mon       *monitor
	suspended bool                // a migration has it: its stops are not for us to judge
	intent    hypervisor.EndCause // what an operator asked for, empty if nothing
	end       *hypervisor.End     // decided, once it must go
	words     string              // what QEMU said about its end
	guestOff  bool                // the guest has switched itself off
	blind     bool                // events may have been missed
	unmet     bool                // left by an earlier agent and not adopted yet
	adopting  bool                // somebody is at that
	offset    int64               // where this run's words begin in the log
}

// quitTimeout is how long a QEMU that was told to quit may take before it is
// killed.
const quitTimeout = 5 * time.Second

// commandTimeout bounds a QMP command that should take no time.
const commandTimeout = 10 * time.Second

// attach makes the process the guest's and watches it. It owns the process and
// the monitor from here on.
func (v *vm) attach(proc *process, mon *monitor) *instance {
	return v.follow(&instance{proc: proc, mon: mon, ended: make(chan struct{})})
}

// attachAdopted is attach for the process of an earlier agent.
func (v *vm) attachAdopted(proc *process, mon *monitor) *instance {
	return v.follow(&instance{proc: proc, mon: mon, ended: make(chan struct{}), unmet: true})
}

func (v *vm) follow(inst *instance) *instance {
	sub := inst.mon.subscribe()
	v.mu.Lock()
	v.inst = inst
	v.mu.Unlock()
	v.d.wg.Go(func() { v.watch(inst, sub) })
	return inst
}

// attachUnmet makes a process the guest's that lives but does not answer. It is
// taken in as soon as it does.
func (v *vm) attachUnmet(proc *process) {
	inst := &instance{proc: proc, mon: deadMonitor(), ended: make(chan struct{}), unmet: true}
	v.change(func() { v.inst, v.state = inst, hypervisor.StateUnreachable })
	v.d.wg.Go(func() { v.watch(inst, inst.mon.subscribe()) })
}

// close lets the process go on without us.
func (i *instance) close() error { return errors.Join(i.mon.close(), i.proc.forget()) }

// watch follows the process to its end, or to the driver's.
func (v *vm) watch(inst *instance, sub *subscription) {
	ctx, cancel := context.WithCancel(v.d.ctx)
	defer cancel()
	v.d.wg.Go(func() {
		select {
		case <-inst.proc.done:
			cancel()
		case <-ctx.Done():
		}
	})
	for sub != nil {
		e, err := sub.next(ctx)
		switch {
		case err == nil:
			v.handle(ctx, inst, e)
		case errors.Is(err, errMonitorClosed):
			sub.close()
			sub = v.redial(ctx, inst)
		default:
			v.drainEvents(inst, sub)
			sub = nil
		}
	}
	select {
	case <-inst.proc.done:
		v.finish(inst)
	default: // the driver is being closed
	}
}

// drainEvents takes what QEMU said before it ended: of an ended process, also
// what is still on its way.
func (v *vm) drainEvents(inst *instance, sub *subscription) {
	defer sub.close()
	select {
	case <-sub.m.done:
	case <-v.d.ctx.Done():
	}
	for {
		e, ok := sub.take()
		if !ok {
			return
		}
		v.noteEnd(inst, e)
	}
}

// redialPause is between two attempts to reach a QEMU that lives but has
// closed its monitor.
const redialPause = time.Second

// redial connects again to a QEMU whose connection broke, for as long as it
// lives. It returns nil when ctx ends.
func (v *vm) redial(ctx context.Context, inst *instance) *subscription {
	for ctx.Err() == nil {
		mon, err := dialMonitor(ctx, v.files.qmp())
		if err == nil {
			sub := mon.subscribe()
			v.mu.Lock()
			old, unmet := inst.mon, inst.unmet
			inst.mon = mon
			v.mu.Unlock()
			if err := old.close(); err != nil {
				v.d.log.Warn("close the old QMP connection", "guest", v.def.Name, "error", err)
			}
			if !unmet {
				v.refreshBlind(ctx, inst)
			} else {
				v.d.wg.Go(func() { v.adoptLate(ctx, inst) }) // it may wait for us
			}
			return sub
		}
		timer := time.NewTimer(redialPause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
	return nil
}

// handle acts on an event of a living QEMU.
func (v *vm) handle(ctx context.Context, inst *instance, e event) {
	v.noteEnd(inst, e)
	switch e.Event.Event {
	case "STOP", "RESUME", "SHUTDOWN", "GUEST_PANICKED", "SUSPEND", "WAKEUP":
		v.mu.Lock()
		leave := inst.suspended || inst.unmet
		v.mu.Unlock()
		if !leave {
			v.refresh(ctx, inst)
		}
	}
}

// noteEnd remembers what an event says about the end of the guest.
func (v *vm) noteEnd(inst *instance, e event) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch e.Event.Event {
	case "SHUTDOWN":
		if guest, _ := e.Data["guest"].(bool); guest {
			inst.guestOff = true
		} else {
			inst.words = e.text("reason")
		}
	case "GUEST_PANICKED":
		inst.words = "the guest's kernel panicked"
	}
}

// refresh asks QEMU how the guest is, and ends the process of a guest that has
// ended.
func (v *vm) refresh(ctx context.Context, inst *instance) {
	runstate, err := v.queryStatus(ctx, inst)
	if err != nil {
		return // the process has ended, or the connection: watch sees it
	}
	end := v.endOf(inst, runstate)
	if end != nil {
		v.retire(inst, *end)
		return
	}
	v.change(func() {
		v.runstate = runstate
		if inst.end == nil {
			v.state = v.stateOf(inst, runstate)
		}
	})
}

// refreshBlind is refresh for a QEMU whose events may have been missed: its
// state has to do.
func (v *vm) refreshBlind(ctx context.Context, inst *instance) {
	set := func(blind bool) {
		v.mu.Lock()
		inst.blind = blind
		v.mu.Unlock()
	}
	set(true)
	v.refresh(ctx, inst)
	set(false)
}

func (v *vm) queryStatus(ctx context.Context, inst *instance) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	var status struct {
		Status string `json:"status"`
	}
	err := v.monitor(inst).run(ctx, "query-status", nil, &status)
	return status.Status, err
}

func (v *vm) monitor(inst *instance) *monitor {
	v.mu.Lock()
	defer v.mu.Unlock()
	return inst.mon
}

// endOf says what QEMU's state tells about the end of the guest, nil if it has
// not ended.
func (v *vm) endOf(inst *instance, runstate string) *hypervisor.End {
	v.mu.Lock()
	defer v.mu.Unlock()
	if inst.suspended {
		return nil // it may be another host's; Resume looks again
	}
	switch runstate {
	case "shutdown":
		if !inst.guestOff && !inst.blind {
			return nil // not the guest's doing: QEMU exits by itself and tells how
		}
		if inst.intent != "" {
			return &hypervisor.End{Cause: inst.intent}
		}
		return &hypervisor.End{Cause: hypervisor.EndPoweredDown}
	case "guest-panicked":
		return &hypervisor.End{Cause: hypervisor.EndCrashed, Detail: "the guest's kernel panicked"}
	case "internal-error":
		return &hypervisor.End{Cause: hypervisor.EndCrashed, Detail: "the CPU could not go on (QEMU's state is internal-error); see qemu.log"}
	}
	return nil
}

// terminal says of QEMU's state that the guest cannot go on from it.
func terminal(runstate string) bool {
	return runstate == "shutdown" || runstate == "guest-panicked" || runstate == "internal-error"
}

// hasRun says of a shell's QEMU that its CPUs have run, for certain.
func hasRun(runstate string) bool {
	return runstate == "running" || runstate == "suspended" || terminal(runstate)
}

// stateOf translates QEMU's state. The vm's mu is held.
func (v *vm) stateOf(inst *instance, runstate string) hypervisor.State {
	switch {
	case inst.suspended:
		return hypervisor.StateMigrating
	case v.rec.Incoming:
		return hypervisor.StateIncoming
	}
	switch runstate {
	case "running", "suspended": // suspended: the guest sleeps (S3) and wakes by itself
		return hypervisor.StateRunning
	case "prelaunch":
		return hypervisor.StateStarting
	case "finish-migrate", "postmigrate", "save-vm", "restore-vm":
		return hypervisor.StateMigrating
	case "inmigrate":
		return hypervisor.StateIncoming
	}
	return hypervisor.StatePaused
}

// retire ends a QEMU whose guest is to run no more, for a reason that is
// recorded before. Only the first reason counts.
func (v *vm) retire(inst *instance, end hypervisor.End) {
	first := false
	v.change(func() {
		if inst.end == nil {
			first = true
			end.At = time.Now()
			inst.end = &end
			v.state = hypervisor.StateStopping
		}
	})
	if !first {
		return
	}
	if err := v.updateRecord(func(r *record) { r.End = &end }); err != nil {
		v.d.log.Error("record how the guest ended", "guest", v.def.Name, "error", err)
	}
	v.d.wg.Go(func() { v.quit(inst) })
}

// quit ends the process: by asking first, so that its disks are flushed.
func (v *vm) quit(inst *instance) {
	ctx, cancel := context.WithTimeout(v.d.ctx, quitTimeout)
	defer cancel()
	err := v.monitor(inst).run(ctx, "quit", nil, nil)
	if err == nil || errors.Is(err, errMonitorClosed) {
		select {
		case <-inst.proc.done:
			return
		case <-ctx.Done():
		}
	}
	if v.d.ctx.Err() != nil {
		return
	}
	if err := inst.proc.kill(v.d.ctx); err != nil && v.d.ctx.Err() == nil {
		v.d.log.Error("end QEMU", "guest", v.def.Name, "error", err)
	}
}

// finish records how an ended process ended and removes what belonged to it.
func (v *vm) finish(inst *instance) {
	if err := v.unlearn(); err != nil {
		v.d.log.Warn("end learning addresses", "guest", v.def.Name, "error", err)
	}
	v.mu.Lock()
	end, words, offset := inst.end, inst.words, inst.offset
	v.mu.Unlock()
	if end == nil {
		end = endOfProcess(inst.proc.exit, words, logTail(v.files.log(), offset))
		if err := v.updateRecord(func(r *record) { r.End = end }); err != nil {
			v.d.log.Error("record how the guest ended", "guest", v.def.Name, "error", err)
		}
	}
	if err := errors.Join(inst.close(), v.cleanRun()); err != nil {
		v.d.log.Error("clean up after the guest", "guest", v.def.Name, "error", err)
	}
	v.d.log.Info("guest ended", "guest", v.def.Name, "end", end.String())
	v.change(func() {
		v.inst, v.runstate, v.state = nil, "", hypervisor.StateStopped
	})
	close(inst.ended)
}

// endOfProcess describes the end of a QEMU that nobody here asked for.
func endOfProcess(e exit, words, log string) *hypervisor.End {
	end := &hypervisor.End{At: time.Now(), Detail: words}
	switch {
	case !e.known:
		end.Cause, end.Detail = hypervisor.EndVanished, joinWords("QEMU ended while no agent watched it", words)
	case e.signal != 0:
		end.Cause, end.Signal = hypervisor.EndKilled, int(e.signal)
	default:
		end.Cause, end.Status = hypervisor.EndExited, e.status
	}
	if log != "" && (e.signal != 0 || e.status != 0) {
		end.Detail = joinWords(end.Detail, log)
	}
	return end
}

func joinWords(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + ": " + b
}
