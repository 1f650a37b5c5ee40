//go:build amd64

package dirtymap

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

func init() { roles["agent"] = agentMain }

// agentMain tracks a region of a process until it is killed.
func agentMain(args []string) error {
	var p Process
	var r Region
	if _, err := fmt.Sscan(args[0], &p.PID, &r.Addr, &r.Size); err != nil {
		return err
	}
	var err error
	if p.PIDFD, err = sys.OpenPidfd(p.PID); err != nil {
		return err
	}
	tr, err := Attach(p, []Region{r})
	if err != nil {
		return err
	}
	if err := tr.Collect([]*Bitmap{New(int(r.Size / PageSize))}); err != nil {
		return err
	}
	fmt.Println("tracking")
	for {
		_ = unix.Pause() // until killed; signals of the runtime end it
	}
}

// precopy copies the guest's memory as a migration does, eight passes while it
// runs and the last while it is stopped, and returns the copy.
func precopy(t *testing.T, g *flatGuest) []byte {
	t.Helper()
	tr, err := Attach(g.Process, []Region{g.region})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
	}()
	g.noUserfaultfd(t) // not even while it is tracked
	dst := make([]byte, flatRAM)
	dirty := New(flatRAM / PageSize)
	// Reading a hole would fill it.
	for e, err := range sys.DataRuns(g.file, 0, flatRAM) {
		if err != nil {
			t.Fatal(err)
		}
		dirty.SetRange(int(e.Off/PageSize), int((e.Off+e.Len)/PageSize))
	}
	copyPages := func() {
		for lo, n := range dirty.Runs() {
			copy(dst[lo*PageSize:(lo+n)*PageSize], g.memory[lo*PageSize:])
		}
		dirty.Reset()
	}
	for pass := range 8 {
		if pass > 0 {
			g.goesOn(t)
			if err := tr.Collect([]*Bitmap{dirty}); err != nil {
				t.Fatal(err)
			}
		}
		t.Logf("pass %d: %d pages", pass+1, dirty.Count())
		copyPages()
	}
	g.goesOn(t)
	g.execute(t, "stop")
	if err := tr.Peek([]*Bitmap{dirty}); err != nil {
		t.Fatal(err)
	}
	t.Logf("last: %d pages", dirty.Count())
	if dirty.Empty() {
		t.Error("a guest that writes all the time wrote nothing")
	}
	if n := dirty.Count(); n > flatPages+200 {
		t.Errorf("%d pages are dirty, the guest writes %d", n, flatPages)
	}
	copyPages()
	return dst
}

func TestQEMU(t *testing.T) {
	requireTracking(t)
	sandbox := []string{"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"}
	for _, c := range []struct {
		name, accel string
		args        []string
	}{
		{"kvm", "kvm", nil},
		{"kvm in a sandbox", "kvm", sandbox},
		{"tcg in a sandbox", "tcg", sandbox},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := startFlat(t, c.accel, c.args...)
			dst := precopy(t, g)
			bad := 0
			for i := 0; i < flatRAM; i += PageSize {
				if !bytes.Equal(dst[i:i+PageSize], g.memory[i:i+PageSize]) {
					bad++
				}
			}
			if bad != 0 {
				t.Errorf("%d of %d pages differ", bad, flatRAM/PageSize)
			}
			untracked(t, g.child)
			g.execute(t, "cont")
			g.goesOn(t)
		})
	}
}

// goesOn waits until the guest has written its first page again.
func (g *flatGuest) goesOn(t *testing.T) {
	t.Helper()
	page := func() byte { return g.memory[flatFirst*PageSize] }
	was := page()
	until(t, "the guest to write", func() bool { return page() != was })
}

// TestAgentDies: what an agent registered ends with it, and the guest does not.
func TestAgentDies(t *testing.T) {
	requireTracking(t)
	g := startFlat(t, "kvm")
	a := startRole(t, "agent", fmt.Sprint(g.PID, g.region.Addr, g.region.Size))
	if s := a.line(t); s != "tracking" {
		t.Fatalf("agent: %q", s)
	}
	g.noUserfaultfd(t)
	killAndReap(t, a)
	untracked(t, g.child)
	g.goesOn(t)
	precopy(t, g) // and the next agent can begin
}

// TestTracersKilledOnQEMU injects into QEMU's main thread, and dies there.
func TestTracersKilledOnQEMU(t *testing.T) {
	requireTracking(t)
	g := startFlat(t, "kvm")
	for _, step := range []string{"prepared", "diverted", "masked", "entered", "called", "copied", "unmasked", "restored"} {
		for range 5 {
			tr := startRole(t, "tracer", fmt.Sprint(g.PID), step)
			if s := tr.line(t); s != "at "+step {
				t.Fatalf("tracer: %q", s)
			}
			killAndReap(t, tr)
			g.execute(t, "query-status") // its main thread answers
		}
	}
	if err := CleanUp(g.Process); err != nil {
		t.Fatal(err)
	}
	untracked(t, g.child)
	g.goesOn(t)
}

func TestGuestDies(t *testing.T) {
	requireTracking(t)
	g := startFlat(t, "kvm")
	tr, err := Attach(g.Process, []Region{g.region})
	if err != nil {
		t.Fatal(err)
	}
	killAndReap(t, g.child)
	if err := tr.Collect([]*Bitmap{New(flatRAM / PageSize)}); !errors.Is(err, ErrExited) {
		t.Errorf("collect: %v", err)
	}
	if err := tr.Peek([]*Bitmap{New(flatRAM / PageSize)}); !errors.Is(err, ErrExited) {
		t.Errorf("peek: %v", err)
	}
	if err := tr.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if err := tr.Peek(nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after close: %v", err)
	}
}
