package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

// processID names a process across agents: a PID alone may be reused.
type processID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after boot, field 22 of /proc/PID/stat
	Boot  string `json:"boot"`  // /proc/sys/kernel/random/boot_id
}

// errGone says that the process of a processID does not exist any more.
var errGone = errors.New("process is gone")

// process is a running or ended QEMU, child of this agent or of an earlier one.
type process struct {
	id    processID
	pidfd *os.File // non-blocking, so that the runtime can wait for it
	done  chan struct{}
	exit  exit // valid once done is closed
	stop  context.CancelFunc
	over  chan struct{} // closed when nobody waits for the process any more
}

// exit is how a process ended.
type exit struct {
	known  bool // false when nobody could tell any more
	status int
	signal syscall.Signal // zero if it was none
}

func (e exit) String() string {
	switch {
	case !e.known:
		return "ended while nobody watched"
	case e.signal != 0:
		return fmt.Sprintf("killed by signal %d (%s)", int(e.signal), e.signal)
	default:
		return fmt.Sprintf("exited with status %d", e.status)
	}
}

// spawn starts a process in a session of its own, so that it outlives the
// agent. files[0..2] are its standard streams.
func spawn(path string, argv []string, files []*os.File) (*process, error) {
	pidfd := -1
	p, err := os.StartProcess(path, argv, &os.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"},
		Files: files,
		Sys:   &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd},
	})
	if err != nil {
		return nil, err
	}
	pid := p.Pid
	if err := p.Release(); err != nil {
		return nil, err
	}
	if pidfd < 0 {
		if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
			return nil, fmt.Errorf("pidfd_open %d: %w", pid, err)
		}
	}
	start, _, err := sys.ProcStat(pid)
	if err != nil {
		return nil, errors.Join(err, unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0), unix.Close(pidfd))
	}
	boot, err := bootID()
	if err != nil {
		return nil, errors.Join(err, unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0), unix.Close(pidfd))
	}
	return watchProcess(processID{PID: pid, Start: start, Boot: boot}, pidfd)
}

// findProcess opens a process that an earlier agent started. It returns
// errGone if that process has ended, also if its PID belongs to another now.
func findProcess(id processID) (*process, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if id.Boot != boot || id.PID <= 0 {
		return nil, errGone
	}
	pidfd, err := unix.PidfdOpen(id.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, errGone
	}
	if err != nil {
		return nil, fmt.Errorf("pidfd_open %d: %w", id.PID, err)
	}
	// The descriptor is open first: what stat says now is true of its process,
	// or the process has ended.
	start, _, err := sys.ProcStat(id.PID)
	switch {
	case err == nil && start == id.Start:
		return watchProcess(id, pidfd)
	case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESRCH):
		return nil, errors.Join(errGone, unix.Close(pidfd))
	}
	// Nobody may take it for gone only because we cannot look.
	return nil, errors.Join(fmt.Errorf("look for process %d: %w", id.PID, err), unix.Close(pidfd))
}

func watchProcess(id processID, pidfd int) (*process, error) {
	if err := unix.SetNonblock(pidfd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("pidfd of %d: %w", id.PID, err), unix.Close(pidfd))
	}
	ctx, stop := context.WithCancel(context.Background())
	p := &process{id: id, pidfd: os.NewFile(uintptr(pidfd), fmt.Sprintf("pidfd:%d", id.PID)), done: make(chan struct{}), stop: stop, over: make(chan struct{})}
	go p.wait(ctx)
	return p, nil
}

// wait closes done when the process has ended, and returns without that when
// ctx ends.
func (p *process) wait(ctx context.Context) {
	defer close(p.over)
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return
	}
	cancel := context.AfterFunc(ctx, func() { _ = p.pidfd.SetReadDeadline(time.Unix(1, 0)) })
	defer cancel()
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		ended, err := sys.PidfdExited(int(fd))
		failed = err
		return ended || err != nil
	})
	if err != nil || failed != nil {
		return // the driver was closed; the process goes on
	}
	_ = raw.Control(func(fd uintptr) { p.exit = exitOf(p.id, int(fd)) })
	close(p.done)
}

// dead says whether the process runs no more: it has ended, or is about to. One of
// which that cannot be told may run.
func (p *process) dead() (dead bool) {
	select {
	case <-p.done: // and closed, perhaps
		return true
	default:
	}
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return false
	}
	if cerr := raw.Control(func(fd uintptr) { dead, err = sys.PidfdOver(p.id.PID, int(fd)) }); cerr != nil {
		err = cerr
	}
	return err == nil && dead
}

// exitOf finds out how an ended process ended: by reaping it if it is a child
// of ours, from the zombie if its parent has not yet taken notice, and from
// the pidfd (Linux 6.15) if it is gone.
func exitOf(id processID, pidfd int) exit {
	if e := exitOfPidfd(pidfd); e.known {
		return e
	}
	start, code, err := sys.ProcStat(id.PID)
	if err != nil || start != id.Start {
		return exitOfPidfd(pidfd)
	}
	var ws unix.WaitStatus
	if pid, err := unix.Wait4(id.PID, &ws, unix.WNOHANG, nil); err == nil && pid == id.PID {
		return exitOfStatus(ws)
	}
	return exitOfStatus(code)
}

func exitOfPidfd(pidfd int) exit {
	ws, err := sys.ExitInfo(pidfd)
	if err != nil {
		return exit{}
	}
	return exitOfStatus(ws)
}

func exitOfStatus(ws unix.WaitStatus) exit {
	if ws.Signaled() {
		return exit{known: true, signal: ws.Signal()}
	}
	return exit{known: true, status: ws.ExitStatus()}
}

// kill ends the process and waits until it has, or ctx ends.
func (p *process) kill(ctx context.Context) error {
	if err := p.signal(unix.SIGKILL); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("process %d does not end after SIGKILL: %w", p.id.PID, ctx.Err())
	}
}

// signal does nothing to a process that has ended.
func (p *process) signal(sig unix.Signal) error {
	raw, err := p.pidfd.SyscallConn()
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.id.PID, err)
	}
	var sent error
	err = raw.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	if errors.Is(err, os.ErrClosed) {
		return nil // its end has been dealt with
	}
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.id.PID, err)
	}
	if sent != nil && !errors.Is(sent, unix.ESRCH) {
		return fmt.Errorf("send %s to process %d: %w", unix.SignalName(sig), p.id.PID, sent)
	}
	return nil
}

// duplicate is a pidfd of the caller's own.
func (p *process) duplicate() (int, error) {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return -1, err
	}
	dup, dupErr := -1, error(nil)
	if err := raw.Control(func(fd uintptr) { dup, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) }); err != nil {
		return -1, err
	}
	return dup, dupErr
}

// forget stops watching; the process goes on.
func (p *process) forget() error {
	p.stop()
	<-p.over
	return p.pidfd.Close()
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return string(bytes.TrimSpace(b)), nil
}
