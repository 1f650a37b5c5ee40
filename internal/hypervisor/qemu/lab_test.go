package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
)

// patience bounds what a test waits for; it measures nothing.
const patience = 90 * time.Second

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// host is a driver with folders of its own, and what it takes to bring it back
// after an agent's death.
type host struct {
	*Driver
	cfg Config
}

func newHost(t *testing.T) *host {
	t.Helper()
	memory, err := os.MkdirTemp("/dev/shm", "lmctl-test-")
	if err != nil {
		testenv.Missing(t, "a tmpfs at /dev/shm", err)
	}
	h := &host{cfg: Config{
		StateDir: filepath.Join(t.TempDir(), "state"), RunDir: filepath.Join(t.TempDir(), "run"), MemoryDir: memory,
		Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}}
	h.open(t)
	t.Cleanup(func() {
		h.clear(t)
		if err := os.RemoveAll(memory); err != nil {
			t.Error(err)
		}
	})
	return h
}

// open brings an agent's driver to life.
func (h *host) open(t *testing.T) {
	t.Helper()
	d, err := New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	h.Driver = d
	if err := d.Adopt(testContext(t)); err != nil {
		t.Fatal(err)
	}
}

// restart is an agent that ends and comes back.
func (h *host) restart(t *testing.T) {
	t.Helper()
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	h.open(t)
}

// clear ends whatever still runs.
func (h *host) clear(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	h.mu.Lock()
	var guests []*vm
	for _, v := range h.guests {
		guests = append(guests, v)
	}
	h.mu.Unlock()
	for _, v := range guests {
		if err := v.end(ctx, hypervisor.End{Cause: hypervisor.EndDestroyed}); err != nil {
			t.Error(err)
		}
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
}

// empty checks that nothing of any guest is left on the host.
func (h *host) empty(t *testing.T) {
	t.Helper()
	for _, dir := range []string{filepath.Join(h.cfg.StateDir, "guests"), filepath.Join(h.cfg.RunDir, "guests"), h.cfg.MemoryDir} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			t.Errorf("%s is left in %s", e.Name(), dir)
		}
	}
	if list := h.List(); len(list) > 0 {
		t.Errorf("the driver still knows %+v", list)
	}
}

// flatGuest is a guest of one boot sector on a disk that every host sees.
type flatGuest struct {
	name, uuid string
	config     flat.Config
	yaml       string
}

func newFlatGuest(t *testing.T, accelerator Accelerator, more string) *flatGuest {
	t.Helper()
	if accelerator == AcceleratorKVM {
		testenv.NeedKVM(t)
	} else {
		testenv.TCG(t)
	}
	g := &flatGuest{name: "flat", uuid: uuid.NewString(), config: flat.Config{Memory: 32 << 20, Pages: 2000, Rate: 20000}}
	image, err := g.config.Image()
	if err != nil {
		t.Fatal(err)
	}
	g.yaml = guestYAML(t, g.name, g.uuid, accelerator, image) + more
	return g
}

// guestYAML defines a guest that boots an image.
func guestYAML(t *testing.T, name, id string, accelerator Accelerator, image []byte) string {
	t.Helper()
	testenv.NeedQEMU(t)
	disk := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(disk, image, 0o600); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("name: %s\nuuid: %s\nmemory: 32MiB\naccelerator: %s\ndisks:\n- path: %s\n  bus: ide\n", name, id, accelerator, disk)
}

// bootSector makes a disk that runs code.
func bootSector(code ...byte) []byte {
	image := make([]byte, flat.DiskSize)
	copy(image, code)
	image[510], image[511] = 0x55, 0xaa
	return image
}

// Boot sectors of guests that do one thing.
var (
	// Waits for ever: hlt; jmp.
	idleSector = bootSector(0xf4, 0xeb, 0xfd)
	// Switches itself off: PM1a control of the PIIX4.
	offSector = bootSector(0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4, 0xeb, 0xfd)
	// Enables the power button, waits for it and switches itself off.
	buttonSector = bootSector(0xba, 0x02, 0x06, 0xb8, 0x00, 0x01, 0xef, 0xba, 0x00, 0x06, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xfa,
		0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4, 0xeb, 0xfd)
	// Tells the pvpanic device that it panicked.
	panicSector = bootSector(0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd)
)

func (h *host) start(t *testing.T, yaml string) string {
	t.Helper()
	def, err := h.Define([]byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Start(testContext(t), def.Name); err != nil {
		t.Fatal(err)
	}
	return def.Name
}

// startFlat starts a flat guest and waits until it does its work.
func (h *host) startFlat(t *testing.T, g *flatGuest) {
	t.Helper()
	h.start(t, g.yaml)
	h.awaitProgress(t, g, 1)
}

// memory opens the guest's memory file, which outlives its name.
func (h *host) memory(t *testing.T, id string) *os.File {
	t.Helper()
	f, err := os.Open(h.filesOf("any", id).memory)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// awaitProgress waits until the guest's counter has grown by more than n, and
// checks the guest's health.
func (h *host) awaitProgress(t *testing.T, g *flatGuest, n uint64) flat.State {
	t.Helper()
	mem := h.memory(t, g.uuid)
	first, err := flat.ReadState(mem)
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for {
		s, err := flat.ReadState(mem)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Err(); s.Booted && err != nil {
			t.Fatal(err)
		}
		if s.Booted && s.Counter > first.Counter+n {
			if _, err := g.config.Check(mem, false); err != nil {
				t.Fatal(err)
			}
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("the guest does not go on: %+v, then %+v", first, s)
		}
		time.Sleep(time.Millisecond) // a guest's memory has no event to wait for
	}
}

// await follows the guest until it is in a state.
func (h *host) await(t *testing.T, name string, state hypervisor.State) hypervisor.Info {
	t.Helper()
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	for i := range h.Watch(ctx) {
		if i.Name == name && i.State == state {
			return i
		}
	}
	t.Fatalf("guest %s never was %s", name, state)
	return hypervisor.Info{}
}

func (h *host) source(t *testing.T, name string) *Guest {
	t.Helper()
	g, err := h.Source(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

func offerOf(t *testing.T, g *Guest) migrate.Offer {
	t.Helper()
	def, err := g.Definition(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	memory, err := g.Memory(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	offer := migrate.Offer{Migration: uuid.NewString(), Source: "host1", Guest: g.Name(), UUID: g.UUID(), Epoch: 2, Definition: def}
	for _, m := range memory {
		offer.Blocks = append(offer.Blocks, migrate.BlockInfo{Name: m.Name, Size: m.Size})
	}
	return offer
}

func (h *host) shell(t *testing.T, offer migrate.Offer) *Shell {
	t.Helper()
	s, err := h.Prepare(testContext(t), offer)
	if err != nil {
		t.Fatal(err)
	}
	return s.(*Shell)
}

// copyMemory copies what the guest has touched, and leaves holes holes.
func copyMemory(t *testing.T, to, from *os.File) {
	t.Helper()
	var off int64
	for {
		start, err := unix.Seek(int(from.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		end, err := unix.Seek(int(from.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.NewOffsetWriter(to, start), io.NewSectionReader(from, start, end-start)); err != nil {
			t.Fatal(err)
		}
		off = end
	}
}
