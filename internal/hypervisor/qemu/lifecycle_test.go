package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/testenv"
)

// startSector starts a guest that boots an image and returns its process.
func (h *host) startSector(t *testing.T, image []byte, more string) (*instance, string) {
	t.Helper()
	testenv.TCG(t)
	id := uuid.NewString()
	name := h.start(t, guestYAML(t, "sector", id, AcceleratorTCG, image)+more)
	v, err := h.lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	v.mu.Lock()
	inst := v.inst
	v.mu.Unlock()
	return inst, id
}

// ended waits for the guest's end and checks that nothing of its process is
// left.
func (h *host) ended(t *testing.T, name, id string) hypervisor.End {
	t.Helper()
	i := h.await(t, name, hypervisor.StateStopped)
	if i.End == nil {
		t.Fatalf("guest %s is stopped without an end", name)
	}
	f := h.filesOf(name, id)
	for _, path := range []string{f.run, f.memory} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	if i.PID != 0 || i.End.At.IsZero() {
		t.Errorf("after its end: %+v", i)
	}
	return *i.End
}

func TestEnds(t *testing.T) {
	tests := []struct {
		name  string
		image []byte
		more  string
		do    func(t *testing.T, h *host, inst *instance)
		want  hypervisor.End
	}{
		{name: "powers itself off", image: offSector, want: hypervisor.End{Cause: hypervisor.EndPoweredDown}},
		{
			name: "panics", image: panicSector, more: "extra-arguments: [-device, pvpanic]\n",
			want: hypervisor.End{Cause: hypervisor.EndCrashed, Detail: "the guest's kernel panicked"},
		},
		{
			name: "stopped", image: buttonSector, want: hypervisor.End{Cause: hypervisor.EndStopped},
			do: func(t *testing.T, h *host, _ *instance) { h.stopWhenReady(t, "sector") },
		},
		{
			name: "destroyed", image: idleSector, want: hypervisor.End{Cause: hypervisor.EndDestroyed},
			do: func(t *testing.T, h *host, _ *instance) {
				if err := h.Destroy(testContext(t), "sector"); err != nil {
					t.Fatal(err)
				}
			},
		},
		{
			name: "killed", image: idleSector, want: hypervisor.End{Cause: hypervisor.EndKilled, Signal: 9},
			do: func(t *testing.T, _ *host, inst *instance) { sendSignal(t, inst, unix.SIGKILL) },
		},
		{
			name: "terminated", image: idleSector, want: hypervisor.End{Cause: hypervisor.EndExited, Detail: "host-signal"},
			do: func(t *testing.T, _ *host, inst *instance) { sendSignal(t, inst, unix.SIGTERM) },
		},
		{
			name: "told to quit by someone else", image: idleSector, want: hypervisor.End{Cause: hypervisor.EndExited, Detail: "host-qmp-quit"},
			do: func(t *testing.T, h *host, _ *instance) {
				i, err := h.Get("sector")
				if err != nil {
					t.Fatal(err)
				}
				observe(t, i.Observer, "quit")
			},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := newHost(t)
			inst, id := h.startSector(t, test.image, test.more)
			if test.do != nil {
				test.do(t, h, inst)
			}
			got := h.ended(t, "sector", id)
			got.At = time.Time{}
			if got != test.want {
				t.Errorf("the guest's end is %+v, not %+v", got, test.want)
			}
			h.restart(t) // what is recorded is what was seen
			again, err := h.Get("sector")
			if err != nil {
				t.Fatal(err)
			}
			again.End.At = time.Time{}
			if *again.End != test.want {
				t.Errorf("the recorded end is %+v, not %+v", *again.End, test.want)
			}
			if err := h.Undefine("sector"); err != nil {
				t.Fatal(err)
			}
			h.empty(t)
		})
	}
}

func sendSignal(t *testing.T, inst *instance, sig unix.Signal) {
	t.Helper()
	if err := inst.proc.signal(sig); err != nil {
		t.Fatal(err)
	}
}

// stopWhenReady presses the power button until the guest has been able to see
// it: firmware does not look.
func (h *host) stopWhenReady(t *testing.T, name string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := h.Stop(testContext(t), name, 200*time.Millisecond)
		if err == nil {
			return
		}
		if !errors.Is(err, hypervisor.ErrStillRunning) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// observe sends one command over the socket that is for people.
func observe(t *testing.T, path, command string) {
	t.Helper()
	m, err := dialMonitor(testContext(t), path)
	if err != nil {
		t.Fatal(err)
	}
	// A QEMU that is told to quit may be gone before it answers.
	if err := m.run(testContext(t), command, nil, nil); err != nil && (command != "quit" || errors.As(err, new(*commandError))) {
		t.Fatal(err)
	}
	if err := m.close(); err != nil {
		t.Fatal(err)
	}
}

// A guest that nobody answers when its power button is pressed runs on, and the
// error says so.
func TestStopUnanswered(t *testing.T) {
	h := newHost(t)
	h.startSector(t, idleSector, "")
	err := h.Stop(testContext(t), "sector", 50*time.Millisecond)
	if !errors.Is(err, hypervisor.ErrStillRunning) {
		t.Fatalf("Stop: %v", err)
	}
	if i := h.await(t, "sector", hypervisor.StateRunning); i.Busy != "" || i.End != nil {
		t.Errorf("after Stop: %+v", i)
	}
	if err := h.Destroy(testContext(t), "sector"); err != nil {
		t.Fatal(err)
	}
	if err := h.Start(testContext(t), "sector"); err != nil {
		t.Fatalf("start again: %v", err)
	}
	var state *hypervisor.StateError
	if err := h.Start(testContext(t), "sector"); !errors.As(err, &state) || state.State != hypervisor.StateRunning {
		t.Errorf("start a running guest: %v", err)
	}
	if err := h.Undefine("sector"); !errors.As(err, &state) {
		t.Errorf("undefine a running guest: %v", err)
	}
}

func TestPausedByObserver(t *testing.T) {
	h := newHost(t)
	h.startSector(t, idleSector, "")
	i, err := h.Get("sector")
	if err != nil {
		t.Fatal(err)
	}
	observe(t, i.Observer, "stop")
	h.await(t, "sector", hypervisor.StatePaused)
	g := h.source(t, "sector")
	if err := g.Movable(testContext(t)); err == nil || !strings.Contains(err.Error(), "the guest is not running (QEMU says paused)") {
		t.Errorf("Movable of a paused guest: %v", err)
	}
	observe(t, i.Observer, "cont")
	h.await(t, "sector", hypervisor.StateRunning)
}

// QEMU's own words reach whoever starts a guest that cannot start.
func TestStartFails(t *testing.T) {
	h := newHost(t)
	testenv.NeedQEMU(t)
	id := uuid.NewString()
	yaml := guestYAML(t, "wrong", id, AcceleratorTCG, idleSector) + "extra-arguments: [-device, no-such-device]\n"
	if _, err := h.Define([]byte(yaml)); err != nil {
		t.Fatal(err)
	}
	err := h.Start(testContext(t), "wrong")
	if err == nil || !strings.Contains(err.Error(), "QEMU exited with status 1") || !strings.Contains(err.Error(), "'no-such-device' is not a valid device model name") {
		t.Fatalf("Start: %v", err)
	}
	if end := h.ended(t, "wrong", id); end.Cause != hypervisor.EndFailed || !strings.Contains(end.Detail, "no-such-device") {
		t.Errorf("end: %+v", end)
	}
}

func TestStartRefused(t *testing.T) {
	testenv.NeedQEMU(t)
	for _, test := range []struct{ name, more, want string }{
		{"machine", "machine: pc-i440fx-99.1\n", `has no machine type "pc-i440fx-99.1"`},
		{"bridge", "nics: [{bridge: lmctl-none}]\n", "there is no bridge lmctl-none on this host"},
		{"no bridge", "nics: [{bridge: lo}]\n", "not a bridge"},
		{"qemu", "qemu: /nonexistent/qemu\n", "install it there or set qemu"},
		{"not qemu", "qemu: /bin/true\n", "/bin/true is no QEMU system emulator"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHost(t)
			id := uuid.NewString()
			if _, err := h.Define([]byte(guestYAML(t, "refused", id, AcceleratorTCG, idleSector) + test.more)); err != nil {
				t.Fatal(err)
			}
			err := h.Start(testContext(t), "refused")
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Start: %v; want %q", err, test.want)
			}
			if i, err := h.Get("refused"); err != nil || i.State != hypervisor.StateStopped {
				t.Errorf("after a refused start: %+v, %v", i, err)
			}
		})
	}
}

func TestWatch(t *testing.T) {
	h := newHost(t)
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	changes := h.Watch(ctx)
	_, _ = h.startSector(t, offSector, "")
	h.await(t, "sector", hypervisor.StateStopped)
	h.idle(t, "sector")
	if err := h.Undefine("sector"); err != nil {
		t.Fatal(err)
	}
	var seen []hypervisor.State
	for i := range changes {
		if len(seen) == 0 || seen[len(seen)-1] != i.State {
			seen = append(seen, i.State)
		}
		if i.State == hypervisor.StateRemoved {
			break
		}
	}
	got, err := json.Marshal(seen)
	if err != nil {
		t.Fatal(err)
	}
	// The guest may be off before Start has seen it run.
	if s := string(got); s != `["stopped","starting","running","stopping","stopped","removed"]` && s != `["stopped","starting","stopping","stopped","removed"]` {
		t.Errorf("states seen: %s", s)
	}
}

func TestConsole(t *testing.T) {
	h := newHost(t)
	h.startSector(t, idleSector, "")
	path, err := h.Console("sector")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if err := h.Destroy(testContext(t), "sector"); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Console("sector"); !errors.As(err, new(*hypervisor.StateError)) {
		t.Errorf("console of a stopped guest: %v", err)
	}
	if _, err := h.Console("nobody"); !errors.Is(err, hypervisor.ErrNotFound) {
		t.Errorf("console of no guest: %v", err)
	}
}
