package qemu

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/testenv"
)

func accelerators(t *testing.T, test func(t *testing.T, accelerator Accelerator)) {
	for _, a := range []Accelerator{AcceleratorTCG, AcceleratorKVM} {
		t.Run(string(a), func(t *testing.T) { test(t, a) })
	}
}

// move does what the engine does, with the guest's memory copied while it
// stands still.
func move(t *testing.T, from, to *host, g *flatGuest) {
	t.Helper()
	ctx := testContext(t)
	src := from.source(t, g.name)
	if err := src.Movable(ctx); err != nil {
		t.Fatal(err)
	}
	shell := to.shell(t, offerOf(t, src))
	r, w := io.Pipe()
	var loading errgroup.Group
	loading.Go(func() error { return shell.LoadState(ctx, r, nil) })
	if _, err := src.Suspend(ctx, w); err != nil {
		t.Fatal(err)
	}
	memory, err := src.Memory(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.config.Check(memory[0].File, true); err != nil {
		t.Fatal(err)
	}
	before, err := flat.ReadState(memory[0].File)
	if err != nil {
		t.Fatal(err)
	}
	copyMemory(t, shell.Memory()[0].File, memory[0].File)
	if err := src.SaveState(ctx); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Close(), loading.Wait()); err != nil {
		t.Fatal(err)
	}
	if err := shell.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	if err := src.Release(ctx); err != nil {
		t.Fatal(err)
	}
	from.empty(t)
	after := to.awaitProgress(t, g, 1)
	if after.Counter <= before.Counter {
		t.Errorf("the counter went from %d to %d", before.Counter, after.Counter)
	}
}

func TestMove(t *testing.T) {
	accelerators(t, func(t *testing.T, a Accelerator) {
		here, there := newHost(t), newHost(t)
		g := newFlatGuest(t, a, "")
		here.startFlat(t, g)
		plain := readSettings(t, here, g.name)
		for range 2 {
			move(t, here, there, g)
			there.await(t, g.name, hypervisor.StateRunning)
			here, there = there, here
			here.idle(t, g.name)
			if got := readSettings(t, here, g.name); !got.equal(plain) {
				t.Errorf("settings after a migration: %v, not %v", got, plain)
			}
		}
	})
}

// A guest moves to a newer QEMU, between newer ones, and back to the older one
// with which it was started.
func TestMoveAcrossVersions(t *testing.T) {
	old, new1, new2 := newHost(t), newHost(t), newHost(t)
	for _, h := range []*host{new1, new2} {
		h.cfg.QEMU, h.cfg.FirmwareDir = testenv.NeedQEMU10(t)
		h.restart(t)
	}
	g := newFlatGuest(t, AcceleratorTCG, "")
	old.startFlat(t, g)
	path := []*host{old, new1, new2, old}
	for i := range path[1:] {
		move(t, path[i], path[i+1], g)
		path[i+1].idle(t, g.name)
	}
}

// A guest of a machine type that only the newer QEMU has is refused by the older.
func TestMoveToOlderRefused(t *testing.T) {
	newer, older := newHost(t), newHost(t)
	newer.cfg.QEMU, newer.cfg.FirmwareDir = testenv.NeedQEMU10(t)
	newer.restart(t)
	g := newFlatGuest(t, AcceleratorTCG, "")
	newer.startFlat(t, g)
	refused(t, older, offerOf(t, newer.source(t, g.name)), "has no machine type pc-i440fx-10.")
}

// idle waits until no operation holds the guest.
func (h *host) idle(t *testing.T, name string) {
	t.Helper()
	v, err := h.lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	ctx := testContext(t)
	for {
		done, err := v.begin("test")
		if err == nil {
			done()
			return
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

type allSettings struct {
	capabilities, parameters []byte
}

func (s allSettings) equal(o allSettings) bool {
	return bytes.Equal(s.capabilities, o.capabilities) && bytes.Equal(s.parameters, o.parameters)
}

// readSettings reads every migration setting of a guest's QEMU.
func readSettings(t *testing.T, h *host, name string) allSettings {
	t.Helper()
	v, err := h.lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	var s allSettings
	for command, out := range map[string]*[]byte{"query-migrate-capabilities": &s.capabilities, "query-migrate-parameters": &s.parameters} {
		var raw rawJSON
		if err := v.monitor(v.inst).run(testContext(t), command, nil, &raw); err != nil {
			t.Fatal(err)
		}
		*out = raw
	}
	return s
}

type rawJSON []byte

func (r *rawJSON) UnmarshalJSON(b []byte) error {
	*r = append((*r)[:0], b...)
	return nil
}

// brokenWriter takes everything until it is cut.
type brokenWriter struct{ cut atomic.Bool }

var errBroken = errors.New("the link is cut")

func (w *brokenWriter) Write(p []byte) (int, error) {
	if w.cut.Load() {
		return 0, errBroken
	}
	return len(p), nil
}

// Every way out of a migration that does not commit ends in a guest that runs
// on as if nothing had been.
func TestAbort(t *testing.T) {
	ways := []struct {
		name string
		do   func(t *testing.T, g *Guest)
	}{
		{"before anything", func(*testing.T, *Guest) {}},
		{"suspended", func(t *testing.T, g *Guest) {
			if _, err := g.Suspend(testContext(t), io.Discard); err != nil {
				t.Fatal(err)
			}
		}},
		{"saved", func(t *testing.T, g *Guest) {
			if _, err := g.Suspend(testContext(t), io.Discard); err != nil {
				t.Fatal(err)
			}
			if err := g.SaveState(testContext(t)); err != nil {
				t.Fatal(err)
			}
		}},
		{"writer breaks in suspend", func(t *testing.T, g *Guest) {
			var w brokenWriter
			w.cut.Store(true)
			if _, err := g.Suspend(testContext(t), &w); !errors.Is(err, errBroken) {
				t.Fatalf("Suspend with a broken writer: %v", err)
			}
		}},
		{"writer breaks in save", func(t *testing.T, g *Guest) {
			var w brokenWriter
			if _, err := g.Suspend(testContext(t), &w); err != nil {
				t.Fatal(err)
			}
			w.cut.Store(true)
			if err := g.SaveState(testContext(t)); err == nil {
				t.Fatal("SaveState succeeded though its writer broke")
			}
		}},
		{"socket cut", func(t *testing.T, g *Guest) {
			if _, err := g.Suspend(testContext(t), io.Discard); err != nil {
				t.Fatal(err)
			}
			if err := g.stream.close(); err != nil {
				t.Fatal(err)
			}
			if err := g.SaveState(testContext(t)); err == nil {
				t.Fatal("SaveState succeeded though its socket was cut")
			}
		}},
	}
	accelerators(t, func(t *testing.T, a Accelerator) {
		h := newHost(t)
		guest := newFlatGuest(t, a, "")
		h.startFlat(t, guest)
		plain := readSettings(t, h, guest.name)
		for _, way := range ways {
			t.Run(way.name, func(t *testing.T) {
				g := h.source(t, guest.name)
				way.do(t, g)
				for range 2 { // it may be repeated
					if err := g.Resume(testContext(t)); err != nil {
						t.Fatal(err)
					}
				}
				unharmed(t, h, guest, plain)
				if err := g.Close(); err != nil {
					t.Fatal(err)
				}
			})
		}
	})
}

// A migration may be cancelled at any moment, also in the one between QEMU's
// looking for that and its going to sleep.
func TestCancelAnywhere(t *testing.T) {
	h := newHost(t)
	guest := newFlatGuest(t, AcceleratorTCG, "")
	h.startFlat(t, guest)
	plain := readSettings(t, h, guest.name)
	for after := time.Duration(0); after < 20*time.Millisecond; after += 250 * time.Microsecond {
		g := h.source(t, guest.name)
		ctx, cancel := context.WithTimeout(testContext(t), after)
		_, err := g.Suspend(ctx, io.Discard)
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("cancelled after %v: %v", after, err)
		}
		if err := errors.Join(g.Resume(testContext(t)), g.Close()); err != nil {
			t.Fatalf("cancelled after %v: %v", after, err)
		}
	}
	unharmed(t, h, guest, plain)
}

// A migration may be broken off at any moment of its completion. The guest's
// disks are its own again afterwards: QEMU ends at the next completion if not.
func TestBreakOffAnywhere(t *testing.T) {
	h := newHost(t)
	guest := newFlatGuest(t, AcceleratorTCG, "")
	h.startFlat(t, guest)
	plain := readSettings(t, h, guest.name)
	for after := time.Duration(0); after < 5*time.Millisecond; after += 50 * time.Microsecond {
		g := h.source(t, guest.name)
		if _, err := g.Suspend(testContext(t), io.Discard); err != nil {
			t.Fatalf("after one broken off at %v: %v", after, err)
		}
		ctx, cancel := context.WithTimeout(testContext(t), after)
		err := g.SaveState(ctx)
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("broken off after %v: %v", after, err)
		}
		if err := errors.Join(g.Resume(testContext(t)), g.Close()); err != nil {
			t.Fatalf("broken off after %v: %v", after, err)
		}
	}
	unharmed(t, h, guest, plain)
}

// unharmed checks that a guest runs on as if nothing had been.
func unharmed(t *testing.T, h *host, g *flatGuest, plain allSettings) {
	t.Helper()
	if i := h.await(t, g.name, hypervisor.StateRunning); i.Suspended || i.Runstate != "running" {
		t.Errorf("after Resume: %+v", i)
	}
	if got := readSettings(t, h, g.name); !got.equal(plain) {
		t.Errorf("settings after Resume: %s, not %s", got, plain)
	}
	if _, err := os.Stat(h.filesOf(g.name, g.uuid).suspension()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the suspension's file is left: %v", err)
	}
	h.awaitProgress(t, g, 1)
}

// An agent that dies in the middle leaves a guest that the next one can let go
// on, or release.
func TestAgentDiesSuspended(t *testing.T) {
	for _, saved := range []bool{false, true} {
		name := map[bool]string{false: "suspended", true: "saved"}[saved]
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			guest := newFlatGuest(t, AcceleratorKVM, "")
			h.startFlat(t, guest)
			plain := readSettings(t, h, guest.name)
			g := h.source(t, guest.name)
			if _, err := g.Suspend(testContext(t), io.Discard); err != nil {
				t.Fatal(err)
			}
			if saved {
				if err := g.SaveState(testContext(t)); err != nil {
					t.Fatal(err)
				}
			}
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			h.restart(t)
			i, err := h.Get(guest.name)
			if err != nil || !i.Suspended || i.State != hypervisor.StateMigrating {
				t.Fatalf("after the agent's death: %+v, %v", i, err)
			}
			g = h.source(t, guest.name)
			if err := g.Resume(testContext(t)); err != nil {
				t.Fatal(err)
			}
			unharmed(t, h, guest, plain)
		})
	}
}

func TestMemoryAndProcess(t *testing.T) {
	h := newHost(t)
	guest := newFlatGuest(t, AcceleratorTCG, "")
	h.startFlat(t, guest)
	g := h.source(t, guest.name)
	memory, err := g.Memory(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(memory) != 1 || memory[0].Size != 32<<20 || memory[0].Addr == 0 {
		t.Fatalf("memory %+v", memory)
	}
	p := g.Process()
	if err := unix.PidfdSendSignal(p.PIDFD, 0, nil, 0); err != nil {
		t.Errorf("pidfd of process %d: %v", p.PID, err)
	}
	// What the process has at that address is the file's content.
	want, got := make([]byte, 512), make([]byte, 512)
	if _, err := memory[0].File.ReadAt(want, 0x7c00); err != nil {
		t.Fatal(err)
	}
	local := []unix.Iovec{{Base: &got[0], Len: 512}}
	remote := []unix.RemoteIovec{{Base: uintptr(memory[0].Addr + 0x7c00), Len: 512}}
	if _, err := unix.ProcessVMReadv(p.PID, local, remote, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, got) || want[510] != 0x55 {
		t.Error("the process has other memory at that address than the file")
	}
	if err := g.Drain(testContext(t)); err != nil {
		t.Error(err)
	}
	if _, err := h.Source(guest.name); !errors.As(err, new(*hypervisor.BusyError)) {
		t.Errorf("a second source of the same guest: %v", err)
	}
	if err := h.Destroy(testContext(t), guest.name); !errors.As(err, new(*hypervisor.BusyError)) {
		t.Errorf("destroy in the middle of a migration: %v", err)
	}
}
