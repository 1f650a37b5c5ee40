package bench

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/flat"
)

func TestCopyMemory(t *testing.T) {
	const length = 64 << 20
	dir := t.TempDir()
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	for _, path := range []string{from, to} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, length); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.OpenFile(from, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range []int64{0, 20 << 20, length - 4096} {
		if _, err := f.WriteAt(bytes.Repeat([]byte{byte(at>>20) + 1}, 4096), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := copyMemory(from, to); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(to)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the copy differs")
	}
	var st unix.Stat_t
	if err := unix.Stat(to, &st); err != nil {
		t.Fatal(err)
	}
	if held := st.Blocks * 512; held > length/2 {
		t.Errorf("%d of %d bytes are no hole in the copy", held, length)
	}
	if err := copyMemory(from, filepath.Join(dir, "nowhere")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("copy to where nothing is: %v", err)
	}
}

// A memory file is watched as soon as it is there and has its length.
func TestArrival(t *testing.T) {
	path := filepath.Join(t.TempDir(), "guest.ram")
	probe := flat.NewProbe(flat.DefaultInterval)
	defer probe.Close()
	a, err := expect(comingAt(path))
	if err != nil {
		t.Fatal(err)
	}
	added := make(chan error, 1)
	go func() { added <- a.add(t.Context(), probe, flat.CounterAddr) }()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	if err := <-added; err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{1}, flat.CounterAddr); err != nil {
		t.Fatal(err)
	}
	if err := awaitMoving(t.Context(), probe); err != nil {
		t.Error(err)
	}
}

func TestArrivalGivesUp(t *testing.T) {
	probe := flat.NewProbe(time.Millisecond)
	defer probe.Close()
	a, err := expect(comingAt(filepath.Join(t.TempDir(), "guest.ram")))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.add(ctx, probe, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want the cancellation", err)
	}
}
