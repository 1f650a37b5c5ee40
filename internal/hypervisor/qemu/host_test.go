package qemu

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/nics"
	"github.com/lmctl/lmctl/migrate"
)

// alter changes what a source says of its guest.
func alter(t *testing.T, offer migrate.Offer, change func(b *bundle)) migrate.Offer {
	t.Helper()
	var b bundle
	if err := json.Unmarshal(offer.Definition, &b); err != nil {
		t.Fatal(err)
	}
	change(&b)
	text, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	offer.Definition = text
	return offer
}

func TestPrepareRefuses(t *testing.T) {
	here, there := newHost(t), newHost(t)
	g := newFlatGuest(t, AcceleratorTCG, "")
	here.startFlat(t, g)
	good := offerOf(t, here.source(t, g.name))
	swap := func(old, new string) func(b *bundle) {
		return func(b *bundle) {
			changed := strings.Replace(b.Definition, old, new, 1)
			if changed == b.Definition {
				t.Fatalf("%q is not in the definition:\n%s", old, b.Definition)
			}
			b.Definition = changed
		}
	}
	tests := []struct {
		name   string
		change func(b *bundle)
		want   []string
	}{
		{"machine type", func(b *bundle) { b.Machine = "pc-i440fx-99.0" }, []string{"has no machine type pc-i440fx-99.0; install QEMU 7.2"}},
		{"page size", func(b *bundle) { b.PageSize = 65536 }, []string{"pages have 4096 bytes here and 65536 at the source"}},
		{"bridge", swap("disks:", "nics: [{bridge: lmctl-none, mac: '52:54:00:00:00:01'}]\ndisks:"), []string{"there is no bridge lmctl-none on this host; create it"}},
		{"disk", swap("disk.img", "other.img"), []string{"no such file or directory on this host; make it reachable under this path"}},
		{"disk size", func(b *bundle) { b.Files[0].Size++ }, []string{"bytes here and", "both must see the same disk"}},
		{"disk identity", func(b *bundle) { b.Files[0].Inode++ }, []string{"another file here", "on shared storage"}},
		{"kind of disk", func(b *bundle) { b.Files[0].Block = true }, []string{"a file here and a block device at the source"}},
		{"QEMU", swap("disks:", "qemu: /nonexistent/qemu\ndisks:"), []string{"install it there or set qemu in the definition"}},
		{"CPU", func(b *bundle) { b.Guest.Words[0].Features = 0x70000000; b.Guest.Vendor = "Other" }, []string{"features that this host lacks", "bits 28,29,30", "the guest's CPU is Other"}},
		{"several", func(b *bundle) { b.PageSize = 1; b.Machine = "none-1" }, []string{"machine type none-1", "pages have"}},
		{"version of the format", func(b *bundle) { b.Version = 9 }, []string{"run the same lmctl on both hosts"}},
		{"bad definition", swap("format: raw", "format: vmdk"), []string{`disks[0].format: "vmdk" is not known`}},
		{"odd machine", func(b *bundle) { b.Machine = "pc,accel=kvm" }, []string{`machine type "pc,accel=kvm"`}},
		{"odd CPU", func(b *bundle) { b.CPU = "max -S" }, []string{`CPU model "max -S"`}},
		{"odd accelerator", func(b *bundle) { b.Accelerator = "hvf" }, []string{`accelerator "hvf"`}},
		{"foreign card", func(b *bundle) { b.Cards = map[string]nics.Facts{"52:54:00:00:00:09": {}} }, []string{"52:54:00:00:00:09"}},
		{"another guest", swap("name: flat", "name: other"), []string{"the description is of guest other"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			refused(t, there, alter(t, good, test.change), test.want...)
		})
	}
	t.Run("memory on offer", func(t *testing.T) {
		offer := good
		offer.Blocks = []migrate.BlockInfo{{Name: memoryBackend, Size: 1 << 20}}
		refused(t, there, offer, "the offered memory")
	})
	t.Run("not JSON", func(t *testing.T) {
		offer := good
		offer.Definition = []byte("{")
		refused(t, there, offer, "cannot be read")
	})
	t.Run("a guest of libvirt", func(t *testing.T) {
		offer := good
		offer.Definition = []byte(`{"version": 3, "hypervisor": "libvirt"}`)
		refused(t, there, offer, "set hypervisor to the same on both hosts")
	})
	t.Run("too long", func(t *testing.T) {
		offer := good
		offer.Definition = bytes.Repeat([]byte(" "), maxBundle+1)
		refused(t, there, offer, "more than 1048576")
	})
	t.Run("something after it", func(t *testing.T) {
		offer := good
		offer.Definition = append(bytes.Clone(good.Definition), "{}"...)
		refused(t, there, offer, "something follows it")
	})
	t.Run("name is taken", func(t *testing.T) {
		other := newHost(t)
		if _, err := other.Define([]byte("name: flat\nmemory: 1MiB\n")); err != nil {
			t.Fatal(err)
		}
		refusedKeeping(t, other, good, "there is already a guest named flat on this host")
	})
	t.Run("UUID is taken", func(t *testing.T) {
		other := newHost(t)
		if _, err := other.Define(fmt.Appendf(nil, "name: twin\nuuid: %s\nmemory: 1MiB\n", g.uuid)); err != nil {
			t.Fatal(err)
		}
		refusedKeeping(t, other, good, "guest twin of this host has the same UUID")
	})
	t.Run("memory", func(t *testing.T) {
		other := newHost(t)
		other.Driver.cfg.MemoryReserve = 1 << 60
		refused(t, other, good, "of memory available", "choose another host")
	})
}

func refusedKeeping(t *testing.T, h *host, offer migrate.Offer, want ...string) {
	t.Helper()
	_, err := h.Prepare(testContext(t), offer)
	var r *migrate.Refusal
	if !errors.As(err, &r) {
		t.Fatalf("Prepare: %v, not a refusal", err)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("Prepare: %v\nwant: %s", err, w)
		}
	}
}

func refused(t *testing.T, h *host, offer migrate.Offer, want ...string) {
	t.Helper()
	refusedKeeping(t, h, offer, want...)
	h.empty(t)
}

// A shell whose QEMU does not start leaves nothing, and says QEMU's words.
func TestPrepareFails(t *testing.T) {
	here, there := newHost(t), newHost(t)
	g := newFlatGuest(t, AcceleratorTCG, "")
	here.startFlat(t, g)
	offer := alter(t, offerOf(t, here.source(t, g.name)), func(b *bundle) { b.Definition += "extra-arguments: [-device, no-such-device]\n" })
	_, err := there.Prepare(testContext(t), offer)
	if err == nil || !strings.Contains(err.Error(), "no-such-device") {
		t.Errorf("Prepare: %v", err)
	}
	there.empty(t)
}

func preparedShell(t *testing.T) (here, there *host, g *flatGuest, src *Guest, shell *Shell) {
	t.Helper()
	here, there = newHost(t), newHost(t)
	g = newFlatGuest(t, AcceleratorTCG, "")
	here.startFlat(t, g)
	src = here.source(t, g.name)
	return here, there, g, src, there.shell(t, offerOf(t, src))
}

func TestShellIsHoles(t *testing.T) {
	_, there, g, _, shell := preparedShell(t)
	memory := shell.Memory()
	if len(memory) != 1 || memory[0].Size != 32<<20 || memory[0].Name != memoryBackend {
		t.Fatalf("memory: %+v", memory)
	}
	if at, err := unix.Seek(int(memory[0].File.Fd()), 0, unix.SEEK_DATA); !errors.Is(err, unix.ENXIO) {
		t.Errorf("the shell's memory has data at %#x (%v)", at, err)
	}
	if i, err := there.Get(g.name); err != nil || i.State != hypervisor.StateIncoming || i.Busy == "" {
		t.Errorf("the shell: %+v, %v", i, err)
	}
	if err := there.Destroy(testContext(t), g.name); !errors.As(err, new(*hypervisor.BusyError)) {
		t.Errorf("destroy a guest that is coming: %v", err)
	}
	if err := shell.Destroy(testContext(t)); err != nil {
		t.Fatal(err)
	}
	there.empty(t)
}

func TestShellLost(t *testing.T) {
	_, there, _, _, shell := preparedShell(t)
	select {
	case <-shell.Lost():
		t.Fatal("the shell is lost at once")
	default:
	}
	sendSignal(t, shell.inst, unix.SIGKILL)
	<-shell.Lost()
	if err := shell.LoadState(testContext(t), strings.NewReader("x"), nil); err == nil {
		t.Error("LoadState of a lost shell succeeded")
	}
	if err := shell.Destroy(testContext(t)); err != nil {
		t.Fatal(err)
	}
	there.empty(t)
}

// A state that QEMU cannot load is its end, and its words say why.
func TestLoadGarbage(t *testing.T) {
	for _, state := range []string{"", "garbage", "QEVM\x00\x00\x00\x03\x00"} {
		_, there, _, _, shell := preparedShell(t)
		err := shell.LoadState(testContext(t), strings.NewReader(state), nil)
		if err == nil {
			t.Fatalf("LoadState(%q) succeeded", state)
		}
		if !strings.Contains(err.Error(), "qemu-system-x86_64:") {
			t.Errorf("LoadState(%q) has no words of QEMU: %v", state, err)
		}
		if err := shell.Destroy(testContext(t)); err != nil {
			t.Fatal(err)
		}
		there.empty(t)
	}
}

// loaded brings a shell to the point where only the word to run is missing.
func loaded(t *testing.T, g *flatGuest, src *Guest, shell *Shell) {
	t.Helper()
	ctx := testContext(t)
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
	copyMemory(t, shell.Memory()[0].File, memory[0].File)
	if err := errors.Join(src.SaveState(ctx), w.Close(), loading.Wait()); err != nil {
		t.Fatal(err)
	}
	// Loading alone touches nothing of the memory that the engine copied.
	if _, err := g.config.Check(shell.Memory()[0].File, true); err != nil {
		t.Fatal(err)
	}
}

// The destination's agent dies with a shell that is ready: the next one finds
// it, and may run or destroy it.
func TestAgentDiesWithShell(t *testing.T) {
	t.Run("run", func(t *testing.T) {
		here, there, g, src, shell := preparedShell(t)
		loaded(t, g, src, shell)
		there.restart(t)
		again, ran, err := there.ShellOf(g.name)
		if err != nil || ran {
			t.Fatalf("ShellOf: ran %v, %v", ran, err)
		}
		if err := again.Resume(testContext(t)); err != nil {
			t.Fatal(err)
		}
		if err := src.Release(testContext(t)); err != nil {
			t.Fatal(err)
		}
		here.empty(t)
		there.awaitProgress(t, g, 1)
		there.idle(t, g.name)
		there.restart(t)
		if i, err := there.Get(g.name); err != nil || i.State != hypervisor.StateRunning {
			t.Errorf("after another restart: %+v, %v", i, err)
		}
	})
	t.Run("destroy", func(t *testing.T) {
		here, there, g, src, shell := preparedShell(t)
		loaded(t, g, src, shell)
		there.restart(t)
		again, _, err := there.ShellOf(g.name)
		if err != nil {
			t.Fatal(err)
		}
		if err := again.Destroy(testContext(t)); err != nil {
			t.Fatal(err)
		}
		there.empty(t)
		if err := src.Resume(testContext(t)); err != nil {
			t.Fatal(err)
		}
		here.awaitProgress(t, g, 1)
	})
	t.Run("died just after the start", func(t *testing.T) {
		_, there, g, src, shell := preparedShell(t)
		loaded(t, g, src, shell)
		if err := shell.startCPUs(testContext(t)); err != nil {
			t.Fatal(err)
		}
		there.restart(t)
		again, ran, err := there.ShellOf(g.name)
		if err != nil || !ran {
			t.Fatalf("ShellOf: ran %v, %v", ran, err)
		}
		if err := again.Destroy(testContext(t)); !errors.Is(err, errRan) {
			t.Errorf("destroy a shell that ran: %v", err)
		}
		if err := again.Resume(testContext(t)); err != nil {
			t.Fatal(err)
		}
		there.awaitProgress(t, g, 1)
	})
	t.Run("died just before the start", func(t *testing.T) {
		_, there, g, src, shell := preparedShell(t)
		loaded(t, g, src, shell)
		if err := os.WriteFile(shell.v.files.resumed(), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		there.restart(t)
		if i, err := there.Get(g.name); err != nil || i.State != hypervisor.StateIncoming {
			t.Errorf("a shell that may have been told to run: %+v, %v", i, err)
		}
		again, ran, err := there.ShellOf(g.name)
		if err != nil || !ran {
			t.Fatalf("ShellOf: ran %v, %v", ran, err)
		}
		if err := again.Destroy(testContext(t)); !errors.Is(err, errRan) {
			t.Errorf("destroy a shell that may have run: %v", err)
		}
		if err := again.Resume(testContext(t)); err != nil {
			t.Fatal(err)
		}
		there.awaitProgress(t, g, 1)
	})
	t.Run("died while receiving", func(t *testing.T) {
		_, there, g, _, shell := preparedShell(t)
		if err := shell.giveUp(); err != nil { // as the kernel would for it
			t.Fatal(err)
		}
		there.restart(t)
		// Its stream ended with the agent, and QEMU with its stream.
		if again, _, err := there.ShellOf(g.name); err == nil {
			<-again.Lost()
			if err := again.Destroy(testContext(t)); err != nil {
				t.Fatal(err)
			}
		} else if !errors.Is(err, hypervisor.ErrNotFound) && !errors.As(err, new(*hypervisor.StateError)) {
			t.Fatal(err)
		}
		there.restart(t)
		there.empty(t)
	})
}

// An agent that dies while it removes a guest that has moved goes on with that
// when it comes back, and never takes the guest for its own again.
func TestAgentDiesReleasing(t *testing.T) {
	h := newHost(t)
	g := newFlatGuest(t, AcceleratorTCG, "")
	h.startFlat(t, g)
	src := h.source(t, g.name)
	if _, err := src.Suspend(testContext(t), io.Discard); err != nil {
		t.Fatal(err)
	}
	if err := src.v.updateRecord(func(r *record) { r.Released = true }); err != nil {
		t.Fatal(err)
	}
	h.restart(t)
	h.empty(t)
}

// What is left in the folders of guests that nobody knows is removed, but not
// when a guest could not be adopted.
func TestSweep(t *testing.T) {
	h := newHost(t)
	stray := h.filesOf("stray", uuid.NewString())
	if err := os.MkdirAll(stray.run, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(stray.memory, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	broken := h.filesOf("broken", uuid.NewString())
	if err := os.MkdirAll(broken.state, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(broken.definition(), []byte("name: [\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	d, err := New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Adopt(testContext(t)); err == nil || !strings.Contains(err.Error(), "adopt guest broken") {
		t.Errorf("Adopt with a broken definition: %v", err)
	}
	if _, err := os.Stat(stray.memory); err != nil {
		t.Errorf("a memory file was removed that may be the broken guest's: %v", err)
	}
	if err := errors.Join(os.RemoveAll(broken.state), d.Close()); err != nil {
		t.Fatal(err)
	}
	h.open(t)
	h.empty(t)
}
