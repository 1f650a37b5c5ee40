package dirtymap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

const (
	// stopTimeout bounds the wait for the thread to stop. It does at once
	// unless it is in an uninterruptible sleep.
	stopTimeout = 2 * time.Second
	// pollMax bounds the pause between two looks. A stop under ptrace is
	// announced by SIGCHLD and wait only, and neither can be waited for with
	// a limit by one thread of a Go program.
	pollMax = 500 * time.Microsecond

	userCS64 = 0x33 // code segment of a thread in 64-bit mode
)

// afterStep is called by tests after each request that changes the traced
// thread, to die there.
var afterStep = func(string) {}

// injection is the tracing of a process' main thread while it executes system
// calls for us. It belongs to one OS thread, with which tracing ends, whatever
// state the traced thread is in: the kernel detaches it.
type injection struct {
	proc     Process
	code     gadgets
	resume   unix.PtraceRegs // what the thread is to go on with
	mask     uint64          // its signal mask
	frame    uint64          // address of the signal frame on its stack
	diverted bool            // the thread has left its own code
	deadline time.Time
	lost     bool // the thread did not stop: it cannot be asked for anything
	sigsys   bool // somebody sent SIGSYS meanwhile
}

// sysCall executes one system call in the traced process.
type sysCall func(nr uint64, args ...uint64) (uint64, error)

// inject runs f, which executes system calls in the main thread of the process.
func inject(p Process, f func(call sysCall) error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and the tracing
		// with the thread, on every path.
		runtime.LockOSThread()
		done <- injectLocked(p, f)
	}()
	return <-done
}

func injectLocked(p Process, f func(call sysCall) error) (err error) {
	if err := checkThread(p); err != nil {
		return err
	}
	code, err := findGadgets(p.PID)
	if err != nil {
		return err
	}
	in := &injection{proc: p, code: code, deadline: time.Now().Add(stopTimeout)}
	if err := in.attach(); err != nil {
		return err
	}
	afterStep("seized")
	if err := in.stop(); err != nil {
		return in.died(err)
	}
	afterStep("stopped")
	if err := in.prepare(); err != nil {
		return errors.Join(in.died(err), in.detach())
	}
	afterStep("prepared")
	return errors.Join(f(in.call), in.detach())
}

// checkThread refuses threads whose return addresses the processor checks.
func checkThread(p Process) error {
	v, _, err := sys.Status(p.PID, "x86_Thread_features")
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("process %d: %w", p.PID, ErrExited)
		}
		return fmt.Errorf("process %d: %w", p.PID, classify(err))
	}
	if strings.Contains(v, "shstk") {
		return fmt.Errorf("%w: process %d has a shadow stack, start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off", ErrUnsupported, p.PID)
	}
	return nil
}

// attach seizes the main thread and makes sure whose it is: as long as it is
// traced its PID cannot be given to another.
func (in *injection) attach() error {
	if err := sys.PtraceSeize(in.proc.PID); err != nil {
		return in.seizeError(err)
	}
	return in.proc.verify()
}

// seizeError finds out why a thread may not be traced.
func (in *injection) seizeError(err error) error {
	if !errors.Is(err, unix.EPERM) {
		return classify(err)
	}
	if verr := in.proc.verify(); verr != nil {
		return verr
	}
	if tracer := statusNumber(in.proc.PID, "TracerPid"); tracer != 0 {
		// That is a thread. If it is gone by now, so is the name of its process.
		return &TracedError{PID: in.proc.PID, Tracer: statusNumber(tracer, "Tgid")}
	}
	return classify(err)
}

// statusNumber returns a number in /proc/PID/status, or zero.
func statusNumber(pid int, field string) int {
	v, _, err := sys.Status(pid, field)
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		return 0
	}
	return n
}

// stop brings the thread to a stop of ours. A signal that was on its way goes
// first, as if nobody were looking.
func (in *injection) stop() error {
	if err := sys.PtraceInterrupt(in.proc.PID); err != nil {
		return err
	}
	for {
		status, err := in.wait()
		if err != nil {
			return err
		}
		if status>>8 == sys.StopEvent {
			return nil
		}
		if err := sys.PtraceCont(in.proc.PID, unix.Signal(status&0xff)); err != nil {
			return err
		}
	}
}

// wait returns the status of the next stop: signal and event.
func (in *injection) wait() (int, error) {
	for pause := 5 * time.Microsecond; ; pause = min(2*pause, pollMax) {
		status, err := sys.WaitStop(in.proc.PID)
		if err != nil || status != 0 {
			return status, err
		}
		exited, err := sys.PidfdExited(in.proc.PIDFD)
		if err != nil {
			return 0, err
		}
		if exited {
			return 0, unix.ESRCH
		}
		if time.Now().After(in.deadline) {
			in.lost = true
			return 0, fmt.Errorf("process %d: %w", in.proc.PID, ErrBusy)
		}
		time.Sleep(pause)
	}
}

// prepare writes the signal frame that restores the thread. It lies below
// everything the thread uses of its stack, so that nothing has happened yet.
func (in *injection) prepare() error {
	pid := in.proc.PID
	regs, err := sys.PtraceGetRegs(pid)
	if err != nil {
		return err
	}
	if regs.Cs != userCS64 {
		return fmt.Errorf("%w: process %d is not in 64-bit mode", ErrUnsupported, pid)
	}
	if in.mask, err = sys.PtraceSigmask(pid); err != nil {
		return err
	}
	xstate, err := sys.PtraceXState(pid)
	if err != nil {
		return err
	}
	in.resume = resumeRegs(regs)
	if err := in.abortRseq(); err != nil {
		return err
	}
	fp, err := fpState(xstate, xstateComponent)
	if err != nil {
		return err
	}
	addr, frame := signalFrame(&in.resume, in.mask, fp, in.code.restorer)
	if err := sys.WriteMemory(pid, addr, frame); err != nil {
		return fmt.Errorf("stack of process %d has no room: %w", pid, classify(err))
	}
	in.frame = addr
	return in.code.verify(pid)
}

// abortRseq does to a thread in a restartable sequence (rseq(2)) what the kernel
// does at a signal: the sequence is to start anew.
func (in *injection) abortRseq() error {
	area, err := sys.PtraceRseq(in.proc.PID)
	if errors.Is(err, unix.EIO) || errors.Is(err, unix.EINVAL) { // before Linux 5.13, or without rseq
		return nil
	}
	if err != nil || area == 0 {
		return err
	}
	var b [32]byte
	if err := sys.ReadMemory(in.proc.PID, area+8, b[:8]); err != nil { // struct rseq: rseq_cs
		return classify(err)
	}
	cs := binary.LittleEndian.Uint64(b[:8])
	if cs == 0 {
		return nil
	}
	if err := sys.ReadMemory(in.proc.PID, cs, b[:]); err != nil { // struct rseq_cs
		return classify(err)
	}
	start := binary.LittleEndian.Uint64(b[8:])
	if in.resume.Rip-start < binary.LittleEndian.Uint64(b[16:]) {
		in.resume.Rip = binary.LittleEndian.Uint64(b[24:])
	}
	return nil
}

// call makes the thread execute one system call. One request diverts it, and
// from there it finds home alone: call, return to the restorer, sigreturn.
//
// Only after that are signals blocked, so that their handlers do not run in
// between; they stay pending, and the frame holds the thread's own mask. SIGSYS
// alone stays open: a seccomp filter that forbids the call raises it, and the
// kernel kills a process that blocks it then.
func (in *injection) call(nr uint64, args ...uint64) (uint64, error) {
	pid := in.proc.PID
	regs := in.resume
	regs.Rip, regs.Rsp, regs.Rax, regs.Orig_rax = in.code.call, in.frame, nr, ^uint64(0)
	for i, r := range []*uint64{&regs.Rdi, &regs.Rsi, &regs.Rdx, &regs.R10, &regs.R8, &regs.R9} {
		if i < len(args) {
			*r = args[i]
		}
	}
	if err := sys.PtraceSetRegs(pid, &regs); err != nil {
		return 0, in.died(err)
	}
	afterStep("diverted")
	in.diverted = true
	const sigsysBit = 1 << (unix.SIGSYS - 1)
	if err := sys.PtraceSetSigmask(pid, ^uint64(sigsysBit)); err != nil {
		return 0, in.died(err)
	}
	afterStep("masked")
	in.deadline = time.Now().Add(stopTimeout)
	if err := in.runTo(sys.SyscallEntry); err != nil {
		return 0, err
	}
	afterStep("entered")
	if err := in.runTo(sys.SyscallExit); err != nil {
		return 0, err
	}
	afterStep("called")
	out, err := sys.PtraceGetRegs(pid)
	if err != nil {
		return 0, in.died(err)
	}
	if out.Rax == nr { // no result that these calls have
		return 0, in.takeSIGSYS()
	}
	if e := -int64(out.Rax); e > 0 && e < 4096 {
		return 0, unix.Errno(e)
	}
	return out.Rax, nil
}

// runTo lets the diverted thread run up to the entry or exit of its system call.
func (in *injection) runTo(where int) error {
	pid := in.proc.PID
	for sig := unix.Signal(0); ; {
		if err := sys.PtraceSyscall(pid, sig); err != nil {
			return in.died(err)
		}
		status, err := in.wait()
		if err != nil {
			return in.died(err)
		}
		sig = 0
		switch {
		case status == sys.StopSyscall:
			at, err := sys.PtraceSyscallStop(pid)
			if err != nil {
				return in.died(err)
			}
			if at != where {
				return fmt.Errorf("process %d: system call stop %d instead of %d", pid, at, where)
			}
			return nil
		case status>>8 == sys.StopEvent:
			// A group stop begins or ends. The thread joins it when it is
			// detached, and is needed until then.
		case unix.Signal(status) == unix.SIGSYS:
			if !in.sentSIGSYS() {
				return fmt.Errorf("%w: a seccomp filter of process %d forbids the call", ErrPermission, pid)
			}
		default: // SIGSTOP, which cannot be blocked
			sig = unix.Signal(status)
		}
	}
}

// takeSIGSYS takes the signal away that a seccomp filter has raised instead of
// letting the call through, with the registers rolled back.
func (in *injection) takeSIGSYS() error {
	if err := in.runTo(sys.SyscallEntry); err != nil {
		return err
	}
	return fmt.Errorf("process %d made no system call", in.proc.PID)
}

// sentSIGSYS tells a SIGSYS that a process sent from one that the kernel raised,
// and keeps the former for later.
func (in *injection) sentSIGSYS() bool {
	code, err := sys.PtraceSignalCode(in.proc.PID)
	if err != nil || code > 0 {
		return false
	}
	in.sigsys = true
	return true
}

// detach puts the thread back where it was and lets it go. The mask comes
// first: until the registers are back, the frame holds it.
func (in *injection) detach() error {
	if in.lost {
		return nil // the kernel detaches it when this OS thread ends
	}
	pid := in.proc.PID
	if in.diverted {
		if err := sys.PtraceSetSigmask(pid, in.mask); err != nil {
			return in.died(err)
		}
		afterStep("unmasked")
		if err := sys.PtraceSetRegs(pid, &in.resume); err != nil {
			return in.died(err)
		}
		afterStep("restored")
	}
	if err := sys.PtraceDetach(pid); err != nil {
		return in.died(err)
	}
	afterStep("detached")
	if in.sigsys {
		return sys.PidfdSignal(in.proc.PIDFD, unix.SIGSYS)
	}
	return nil
}

// died says that the process has ended when that is why a request failed.
func (in *injection) died(err error) error {
	if !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ECHILD) {
		return err
	}
	if exited, perr := sys.PidfdExited(in.proc.PIDFD); perr == nil && !exited {
		return err
	}
	return fmt.Errorf("process %d: %w: %w", in.proc.PID, ErrExited, err)
}
