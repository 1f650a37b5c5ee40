//go:build amd64

package dirtymap

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
	"github.com/lmctl/lmctl/internal/testenv"
)

func init() {
	roles["victim"] = victimMain
	roles["tracer"] = tracerMain
	roles["sleeper"] = sleeperMain
}

// compute goes through a long chain of floating point operations that leaves the
// same bits every time, unless a register is lost on the way.
func compute() uint64 {
	a, b, c, d := 1.0, 2.0, 3.0, 4.0
	n := uint64(1)
	for range 20_000 {
		a, b, c, d = b*1.000001+c, c*0.999-d, d+a*0.5, math.Sqrt(a*a+b*b)
		n = n*6364136223846793005 + math.Float64bits(a)
		if d > 1e6 {
			a, b, c, d = a/1e6, b/1e6, c/1e6, d/1e6
		}
	}
	return n ^ math.Float64bits(a) ^ math.Float64bits(b) ^ math.Float64bits(c) ^ math.Float64bits(d)
}

// victimMain runs on the main thread of its process and alternates between what
// an injection may interrupt: computing, polling, sleeping. It counts the signals
// that it gets. To each line of input it answers with what it has counted.
func victimMain(args []string) error {
	runtime.LockOSThread() // TestMain runs on the main thread: see init
	usr1 := make(chan os.Signal, 1<<16)
	signal.Notify(usr1, unix.SIGUSR1)
	var signals atomic.Int64
	go func() {
		for range usr1 {
			signals.Add(1)
		}
	}()
	ask := make(chan struct{})
	go func() {
		in := bufio.NewScanner(os.Stdin)
		for in.Scan() {
			ask <- struct{}{}
		}
		close(ask)
	}()
	want := compute()
	fmt.Println("ready", unix.Gettid() == os.Getpid())
	rounds := 0
	for {
		if got := compute(); got != want {
			return fmt.Errorf("round %d: computed %#x, not %#x", rounds, got, want)
		}
		if n, err := unix.Poll(nil, 1); n > 0 || err != nil && err != unix.EINTR {
			return fmt.Errorf("poll: %d, %v", n, err)
		}
		rest := unix.Timespec{Nsec: 200_000}
		if err := unix.Nanosleep(&rest, nil); err != nil && err != unix.EINTR {
			return fmt.Errorf("nanosleep: %v", err)
		}
		rounds++
		select {
		case _, ok := <-ask:
			if !ok {
				return nil
			}
			fmt.Println(rounds, signals.Load())
		default:
		}
	}
}

// sleeperMain sits in one system call that nothing ends, like an idle guest.
func sleeperMain([]string) error {
	runtime.LockOSThread()
	var p [2]int
	if err := unix.Pipe(p[:]); err != nil {
		return err
	}
	fmt.Println("ready")
	n, err := unix.Ppoll([]unix.PollFd{{Fd: int32(p[0]), Events: unix.POLLIN}}, nil, nil)
	return fmt.Errorf("ppoll returned %d, %w", n, err)
}

// tracerMain attaches to the process of args[0], over and over, and stops at the
// step of args[1], to be killed there; or dies when it is told to, without one.
func tracerMain(args []string) error {
	var pid int
	if _, err := fmt.Sscan(args[0], &pid); err != nil {
		return err
	}
	pidfd, err := sys.OpenPidfd(pid)
	if err != nil {
		return err
	}
	p := Process{PID: pid, PIDFD: pidfd}
	if len(args) > 1 {
		afterStep = func(name string) {
			if name == args[1] {
				fmt.Println("at", name)
				for {
					_ = unix.Pause() // until killed; signals of the runtime end it
				}
			}
		}
	} else {
		fmt.Println("at work")
	}
	for {
		fd, err := borrowUserfault(p)
		if err != nil {
			return err
		}
		unix.Close(fd)
	}
}

func startVictim(t *testing.T) *child {
	t.Helper()
	v := startRole(t, "victim")
	if s := v.line(t); s != "ready true" {
		t.Fatalf("victim: %q", s)
	}
	return v
}

// healthy asks a victim for its counts; it would have ended had it found a fault.
func (c *child) healthy(t *testing.T) (rounds, signals int) {
	t.Helper()
	if _, err := fmt.Fprintln(c.in); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(c.line(t), &rounds, &signals); err != nil {
		t.Fatal(err)
	}
	return rounds, signals
}

// noUserfaultfd fails the test if the process still holds a userfaultfd.
func (c *child) noUserfaultfd(t *testing.T) {
	t.Helper()
	fds, err := Leftovers(c.PID)
	if err != nil || len(fds) != 0 {
		t.Fatalf("userfaultfds %v left in process, %v", fds, err)
	}
}

func TestInjectMany(t *testing.T) {
	requireTracking(t)
	v := startVictim(t)
	before, _ := v.healthy(t)
	for range 300 {
		fd, err := borrowUserfault(v.Process)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
	}
	if after, _ := v.healthy(t); after <= before {
		t.Errorf("victim stands at round %d", after)
	}
	v.noUserfaultfd(t)
}

func TestInjectLosesNoSignal(t *testing.T) {
	requireTracking(t)
	v := startVictim(t)
	const n = 100
	for i := range n {
		// One at a time: the kernel merges those that wait.
		done := make(chan error, 1)
		go func() {
			fd, err := borrowUserfault(v.Process)
			if err == nil {
				err = unix.Close(fd)
			}
			done <- err
		}()
		if err := unix.Tgkill(v.PID, v.PID, unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		deadline := time.Now().Add(10 * time.Second)
		for {
			if _, got := v.healthy(t); got == i+1 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("signal %d was lost", i)
			}
		}
	}
}

// TestTracerKilledAtStep kills the tracer after each request that changes the
// traced thread.
func TestTracerKilledAtStep(t *testing.T) {
	requireTracking(t)
	v := startVictim(t)
	for _, step := range []string{
		"seized", "stopped", "prepared", "diverted", "masked", "entered", "called",
		"copied", "unmasked", "restored", "detached",
	} {
		t.Run(step, func(t *testing.T) {
			for range 20 {
				tr := startRole(t, "tracer", fmt.Sprint(v.PID), step)
				if s := tr.line(t); s != "at "+step {
					t.Fatalf("tracer: %q", s)
				}
				killAndReap(t, tr)
				v.healthy(t)
			}
			mask, _, err := sys.Status(v.PID, "SigBlk")
			if err != nil || strings.Trim(mask, "0") != "" {
				t.Errorf("blocked signals %s, %v", mask, err)
			}
			if err := CleanUp(v.Process); err != nil {
				t.Fatal(err)
			}
			v.noUserfaultfd(t)
		})
	}
}

// TestTracerKilledAnywhere kills the tracer wherever it happens to be.
func TestTracerKilledAnywhere(t *testing.T) {
	requireTracking(t)
	v := startVictim(t)
	for i := range 60 {
		tr := startRole(t, "tracer", fmt.Sprint(v.PID))
		if s := tr.line(t); s != "at work" {
			t.Fatalf("tracer: %q", s)
		}
		for range i * 37 % 400 { // spread over its loop, without regard to the clock
			runtime.Gosched()
			_ = compute()
		}
		killAndReap(t, tr)
		v.healthy(t)
	}
	if err := CleanUp(v.Process); err != nil {
		t.Fatal(err)
	}
	v.noUserfaultfd(t)
}

// TestIdleSyscallGoesOn: the interrupted call is restarted, whoever restores.
func TestIdleSyscallGoesOn(t *testing.T) {
	requireTracking(t)
	s := startRole(t, "sleeper")
	s.line(t)
	for _, step := range []string{"", "prepared", "masked", "called", "unmasked"} {
		if step == "" {
			fd, err := borrowUserfault(s.Process)
			if err != nil {
				t.Fatal(err)
			}
			unix.Close(fd)
		} else {
			tr := startRole(t, "tracer", fmt.Sprint(s.PID), step)
			tr.line(t)
			killAndReap(t, tr)
		}
		waitInSyscall(t, s.PID, unix.SYS_PPOLL)
	}
}

// TestPlainProgram traces a program that knows nothing of all this, and that
// sleeps with a time limit.
func TestPlainProgram(t *testing.T) {
	requireTracking(t)
	path := testenv.NeedTool(t, "sleep")
	c := start(t, exec.Command(path, "1000"))
	waitInSyscall(t, c.PID, unix.SYS_CLOCK_NANOSLEEP)
	fd, err := borrowUserfault(c.Process)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	waitInSyscall(t, c.PID, unix.SYS_RESTART_SYSCALL)
	tr := startRole(t, "tracer", fmt.Sprint(c.PID), "masked")
	tr.line(t)
	killAndReap(t, tr)
	waitInSyscall(t, c.PID, unix.SYS_CLOCK_NANOSLEEP) // sleep(1) repeats it after EINTR
}

// TestInjectIntoStopped: a process that somebody stopped stays stopped.
func TestInjectIntoStopped(t *testing.T) {
	requireTracking(t)
	v := startVictim(t)
	if err := unix.Kill(v.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	waitState(t, v.PID, "T (stopped)")
	fd, err := borrowUserfault(v.Process)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	waitState(t, v.PID, "T (stopped)")
	if err := unix.Kill(v.PID, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	v.healthy(t)
	v.noUserfaultfd(t)
}

// TestKilledWhileTraced: the end of the process ends the injection.
func TestKilledWhileTraced(t *testing.T) {
	requireTracking(t)
	for _, step := range []string{"seized", "stopped", "prepared", "diverted", "masked", "entered", "called", "copied", "unmasked", "restored"} {
		t.Run(step, func(t *testing.T) {
			v := startVictim(t)
			defer func() { afterStep = func(string) {} }()
			afterStep = func(name string) {
				if name == step {
					if err := sys.PidfdSignal(v.PIDFD, unix.SIGKILL); err != nil {
						t.Error(err)
					}
					if err := sys.WaitPidfd(context.Background(), v.PIDFD); err != nil {
						t.Error(err)
					}
				}
			}
			fd, err := borrowUserfault(v.Process)
			if !errors.Is(err, ErrExited) {
				t.Errorf("descriptor %d, %v", fd, err)
			}
			if err := v.cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
				t.Errorf("its parent sees %v", err)
			}
		})
	}
}

func killAndReap(t *testing.T, c *child) {
	t.Helper()
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Wait(); err == nil {
		t.Fatal("tracer ended by itself")
	}
}

// until waits for what no event tells, the state of another process in /proc.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func waitState(t *testing.T, pid int, state string) {
	t.Helper()
	until(t, "state "+state, func() bool {
		s, _, err := sys.Status(pid, "State")
		return err == nil && s == state
	})
}

func waitInSyscall(t *testing.T, pid, nr int) {
	t.Helper()
	until(t, fmt.Sprintf("system call %d", nr), func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", pid))
		return err == nil && strings.HasPrefix(string(b), fmt.Sprint(nr, " "))
	})
}
