package qemu

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/testenv"
)

// Guests outlive their agent, and the next one finds them.
func TestAdoptRunning(t *testing.T) {
	accelerators(t, func(t *testing.T, a Accelerator) {
		h := newHost(t)
		g := newFlatGuest(t, a, "")
		h.startFlat(t, g)
		before, err := h.Get(g.name)
		if err != nil {
			t.Fatal(err)
		}
		h.restart(t)
		after, err := h.Get(g.name)
		if err != nil {
			t.Fatal(err)
		}
		if after.PID != before.PID || after.State != hypervisor.StateRunning || after.Machine != before.Machine || after.Machine == "pc" {
			t.Errorf("adopted as %+v, was %+v", after, before)
		}
		h.awaitProgress(t, g, 1)
		// How an adopted guest ends is seen too.
		v, err := h.lookup(g.name)
		if err != nil {
			t.Fatal(err)
		}
		sendSignal(t, v.inst, unix.SIGKILL)
		if end := h.ended(t, g.name, g.uuid); end.Cause != hypervisor.EndKilled || end.Signal != 9 {
			t.Errorf("end: %+v", end)
		}
	})
}

// What a guest did while no agent watched is found out afterwards.
func TestAdoptEnded(t *testing.T) {
	t.Run("powered off meanwhile", func(t *testing.T) {
		h := newHost(t)
		_, id := h.startSector(t, buttonSector, "")
		i, err := h.Get("sector")
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		pressUntilShutdown(t, i.Observer)
		h.open(t)
		if end := h.ended(t, "sector", id); end.Cause != hypervisor.EndPoweredDown {
			t.Errorf("end: %+v", end)
		}
	})
	t.Run("killed meanwhile", func(t *testing.T) {
		h := newHost(t)
		inst, id := h.startSector(t, idleSector, "")
		pidfd, err := inst.proc.duplicate()
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pidfd)
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil {
			t.Fatal(err)
		}
		// The test stands in for init, which takes notice of the orphan's end.
		if _, err := unix.Wait4(inst.proc.id.PID, nil, 0, nil); err != nil {
			t.Fatal(err)
		}
		h.open(t)
		if end := h.ended(t, "sector", id); end.Cause != hypervisor.EndVanished {
			t.Errorf("end: %+v", end)
		}
	})
	t.Run("the host was restarted", func(t *testing.T) {
		h := newHost(t)
		_, id := h.startSector(t, idleSector, "")
		if err := h.Destroy(testContext(t), "sector"); err != nil {
			t.Fatal(err)
		}
		v, err := h.lookup("sector")
		if err != nil {
			t.Fatal(err)
		}
		if err := v.updateRecord(func(r *record) { r.End = nil }); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(v.files.run, 0o700); err != nil {
			t.Fatal(err)
		}
		// Our own PID, but from another boot.
		if err := writeJSON(v.files.process(), processID{PID: os.Getpid(), Start: 1, Boot: "another"}, false); err != nil {
			t.Fatal(err)
		}
		h.restart(t)
		if end := h.ended(t, "sector", id); end.Cause != hypervisor.EndVanished || end.Detail != "the host was restarted" {
			t.Errorf("end: %+v", end)
		}
	})
}

// A QEMU that lives but does not answer when its agent comes back keeps its
// guest, and is adopted when it answers.
func TestAdoptUnreachable(t *testing.T) {
	h := newHost(t)
	inst, _ := h.startSector(t, idleSector, "")
	pidfd, err := inst.proc.duplicate()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unix.PidfdSendSignal(pidfd, unix.SIGSTOP, nil, 0); err != nil {
		t.Fatal(err)
	}
	if h.Driver, err = New(h.cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(testContext(t), 100*time.Millisecond)
	defer cancel()
	if err := h.Adopt(ctx); err != nil {
		t.Fatal(err)
	}
	h.await(t, "sector", hypervisor.StateUnreachable)
	if err := h.Start(testContext(t), "sector"); !errors.As(err, new(*hypervisor.StateError)) {
		t.Errorf("start a guest that cannot be reached: %v", err)
	}
	if err := unix.PidfdSendSignal(pidfd, unix.SIGCONT, nil, 0); err != nil {
		t.Fatal(err)
	}
	h.await(t, "sector", hypervisor.StateRunning)
}

// An agent that dies between starting a QEMU and noting its process leaves none
// that nobody knows, whether it was to run a guest or to take one in.
func TestAdoptUnnoted(t *testing.T) {
	for name, incoming := range map[string]bool{"start": false, "shell": true} {
		t.Run(name, func(t *testing.T) {
			testenv.TCG(t)
			h := newHost(t)
			if _, err := h.Define([]byte(guestYAML(t, "sector", uuid.NewString(), AcceleratorTCG, idleSector))); err != nil {
				t.Fatal(err)
			}
			v, err := h.lookup("sector")
			if err != nil {
				t.Fatal(err)
			}
			run, err := h.resolve(testContext(t), v.def)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := v.launch(testContext(t), run, incoming); err != nil {
				t.Fatal(err)
			}
			pidfd := h.abandon(t, v)
			h.open(t)
			awaitExit(t, pidfd)
			if i, err := h.Get("sector"); err != nil || i.State != hypervisor.StateStopped {
				t.Errorf("afterwards: %+v, %v", i, err)
			}
			if _, err := os.Stat(v.files.run); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("its run folder is left (%v)", err)
			}
		})
	}
	t.Run("runs", func(t *testing.T) { // somebody has removed the file
		h := newHost(t)
		inst, _ := h.startSector(t, idleSector, "")
		v, err := h.lookup("sector")
		if err != nil {
			t.Fatal(err)
		}
		noted, err := os.ReadFile(v.files.process())
		if err != nil {
			t.Fatal(err)
		}
		h.abandon(t, v)
		if h.Driver, err = New(h.cfg); err != nil {
			t.Fatal(err)
		}
		if err := h.Adopt(testContext(t)); err == nil || !strings.Contains(err.Error(), "its QEMU is running") {
			t.Errorf("adopted: %v", err)
		}
		if i, err := h.Get("sector"); err != nil || i.State != hypervisor.StateUnreachable {
			t.Errorf("it is %+v, %v", i, err)
		}
		if err := os.WriteFile(v.files.process(), noted, 0o600); err != nil {
			t.Fatal(err)
		}
		h.restart(t)
		if i, err := h.Get("sector"); err != nil || i.State != hypervisor.StateRunning || i.PID != inst.proc.id.PID {
			t.Errorf("noted again: %+v, %v", i, err)
		}
	})
}

// abandon is an agent's death before it has noted a guest's process, of which it
// returns a pidfd.
func (h *host) abandon(t *testing.T, v *vm) int {
	t.Helper()
	pidfd, err := v.inst.proc.duplicate()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Close(pidfd); err != nil {
			t.Error(err)
		}
	})
	if err := errors.Join(h.Close(), os.Remove(v.files.process())); err != nil {
		t.Fatal(err)
	}
	return pidfd
}

// awaitExit waits until a process has ended.
func awaitExit(t *testing.T, pidfd int) {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, int(patience.Milliseconds())); err != nil || n != 1 {
		t.Fatalf("the process does not end: %d, %v", n, err)
	}
}

// A guest of which it cannot be found out whether it runs is not taken for one
// that does not.
func TestAdoptUnknown(t *testing.T) {
	h := newHost(t)
	inst, _ := h.startSector(t, idleSector, "")
	v, err := h.lookup("sector")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{v.files.process(), v.files.record(), v.files.definition()} {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		if h.Driver, err = New(h.cfg); err != nil {
			t.Fatal(err)
		}
		if err := h.Adopt(testContext(t)); err == nil {
			t.Errorf("%s cannot be read, and the guest is adopted", path)
		}
		if i, err := h.Get("sector"); err != nil || i.State != hypervisor.StateUnreachable {
			t.Errorf("%s cannot be read: %+v, %v", path, i, err)
		}
		for name, err := range map[string]error{
			"start": h.Start(testContext(t), "sector"), "undefine": h.Undefine("sector"), "destroy": h.Destroy(testContext(t), "sector"),
		} {
			if !errors.As(err, new(*hypervisor.StateError)) {
				t.Errorf("%s cannot be read: %s says %v", path, name, err)
			}
		}
		if _, err := os.Stat(v.files.memory); err != nil {
			t.Error(err)
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h.restart(t)
	if i := h.await(t, "sector", hypervisor.StateRunning); i.PID != inst.proc.id.PID {
		t.Errorf("adopted process %d, was %d", i.PID, inst.proc.id.PID)
	}
}

// pressUntilShutdown presses the power button until QEMU says that the guest
// has switched itself off.
func pressUntilShutdown(t *testing.T, socket string) {
	t.Helper()
	m, err := dialMonitor(testContext(t), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	sub := m.subscribe()
	defer sub.close()
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) {
		if err := m.run(testContext(t), "system_powerdown", nil, nil); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(testContext(t), 200*time.Millisecond)
		e, err := sub.next(ctx)
		for ; err == nil; e, err = sub.next(ctx) {
			if e.Event.Event == "SHUTDOWN" {
				cancel()
				return
			}
		}
		cancel()
	}
	t.Fatal("the guest does not switch itself off")
}

// Another process that has a dead guest's PID is left alone.
func TestAdoptReusedPID(t *testing.T) {
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := findProcess(processID{PID: os.Getpid(), Start: 1, Boot: boot}); !errors.Is(err, errGone) {
		t.Errorf("our own process with another start time: %v", err)
	}
}
