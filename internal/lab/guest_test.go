package lab

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/lmctl/lmctl/guest/client"
	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/guest/workload"
	"github.com/lmctl/lmctl/internal/testenv"
)

// program builds lmctl and the guest's init, once for all tests.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "lmctl-test-")
	if err != nil {
		return "", err
	}
	built = dir
	init, err := linux.BuildInit(context.Background())
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(dir, "init"), init, 0o600); err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "lmctl"), "github.com/lmctl/lmctl/cmd/lmctl")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	out, err := cmd.CombinedOutput()
	os.Stderr.Write(out)
	return filepath.Join(dir, "lmctl"), err
})

// built is what TestMain removes when all tests are done.
var built string

// realLab is a lab with real agents.
func realLab(t *testing.T) *Lab {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedQEMU(t)
	binary, err := program()
	if err != nil {
		t.Fatalf("build lmctl: %v", err)
	}
	t.Setenv("LMCTL_GUEST_INIT", filepath.Join(built, "init"))
	return up(t, Options{Binary: binary, MemoryLimit: 1 << 30})
}

func start(t *testing.T, l *Lab, spec GuestSpec) Guest {
	t.Helper()
	g, err := l.StartGuest(t.Context(), spec, func(what string) { t.Log(what) })
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func healthy(t *testing.T, l *Lab, g Guest, host string) Verdict {
	t.Helper()
	v, err := l.CheckGuest(t.Context(), g.Name)
	if err != nil || !v.OK || v.Host != host {
		t.Fatalf("verdict %+v, %v; want a healthy guest on %s", v, err, host)
	}
	return v
}

// damage flips a bit in a guest's memory, where a page has this content.
func damage(t *testing.T, l *Lab, g Guest, page []byte, at int64) {
	t.Helper()
	f, err := os.OpenFile(l.MemoryFile(g.Host, g), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, workload.PageSize)
	for off := at; off < g.Memory; off += workload.PageSize {
		if _, err := f.ReadAt(b, off); err != nil {
			t.Fatal(err)
		}
		if page == nil || bytes.Equal(b, page) {
			b[3] ^= 0x40
			if _, err := f.WriteAt(b[:4], off); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("the page is not in the guest's memory")
}

// ticks sees a guest's tick through a probe of its memory file.
func ticks(t *testing.T, l *Lab, g Guest) {
	t.Helper()
	off, err := l.TickOffset(t.Context(), g)
	if err != nil {
		t.Fatal(err)
	}
	p := flat.NewProbe(time.Millisecond)
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := p.Add(l.MemoryFile(g.Host, g), off); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(time.Minute); !p.Moving(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("the probe sees no tick")
		}
	}
}

func TestFlatGuest(t *testing.T) {
	testenv.NeedKVM(t)
	l := realLab(t)
	g := start(t, l, GuestSpec{Name: "flat", Kind: Flat, Host: "host2", Memory: 32 << 20, DirtyRate: Unbounded, WorkingSet: 8 << 20})
	v := healthy(t, l, g, "host2")
	if again := healthy(t, l, g, "host2"); again.Counter <= v.Counter {
		t.Errorf("the counter went from %d to %d", v.Counter, again.Counter)
	}
	ticks(t, l, g)
	damage(t, l, g, nil, flat.FirstPage+5*flat.PageSize)
	if v, err := l.CheckGuest(t.Context(), g.Name); err != nil || v.OK || len(v.Problems) == 0 {
		t.Errorf("after damage: %+v, %v", v, err)
	}
	if err := l.RemoveGuest(t.Context(), g.Name); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{l.MemoryFile("host2", g), l.diskOf(g), l.guestFile(g.Name)} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("left behind: %s: %v", path, err)
		}
	}
	if _, err := l.CheckGuest(t.Context(), g.Name); err == nil {
		t.Error("a guest that was removed has a verdict")
	}
}

func TestLinuxGuest(t *testing.T) {
	testenv.TCG(t)
	l := realLab(t)
	g := start(t, l, GuestSpec{Name: "linux", Kind: Linux, Host: "host1", Memory: 192 << 20, DirtyRate: 4 << 20,
		WorkingSet: 8 << 20, Pattern: "random", DiskSetting: control.DiskSetting{Rate: 10, Readers: 1}})
	v := healthy(t, l, g, "host1")
	if v.Linux.Memory.Setting.WorkingSet != 8<<20 || v.Linux.Disk == nil {
		t.Errorf("it does something else than it was told: %+v", v.Linux)
	}
	ticks(t, l, g)
	served(t, l, g)
	if _, err := l.StartGuest(t.Context(), g.GuestSpec, func(string) {}); err == nil {
		t.Error("a second guest of that name starts")
	}
	damage(t, l, g, workload.StaticPage(g.settings().Seed, 3), 0)
	if v, err := l.CheckGuest(t.Context(), g.Name); err != nil || v.OK || !strings.Contains(strings.Join(v.Problems, " "), "static page 3") {
		t.Errorf("after damage: %+v, %v", v, err)
	}
	if err := Down(t.Context(), l.dir); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, l)
}

// served uses a guest's services from the client for a while.
func served(t *testing.T, l *Lab, g Guest) {
	t.Helper()
	tcp, err := l.DialGuest(t.Context(), g, "tcp", control.NumberedPort)
	if err != nil {
		t.Fatal(err)
	}
	udp, err := l.DialGuest(t.Context(), g, "udp", control.EchoPort)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), 2*time.Second)
	defer stop()
	var group errgroup.Group
	group.Go(func() error {
		n, err := client.Number(ctx, tcp, 20*time.Millisecond)
		if !n.Whole() {
			t.Errorf("TCP: %+v", n)
		}
		return err
	})
	group.Go(func() error {
		p, err := client.Ping(ctx, udp, 10*time.Millisecond)
		if p.Sent == 0 || p.Lost == p.Sent || p.Doubled != 0 {
			t.Errorf("UDP: %+v", p)
		}
		return err
	})
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
}

func TestGuestRefused(t *testing.T) {
	l := up(t, Options{Hosts: 1, NoAgents: true})
	for want, spec := range map[string]GuestSpec{
		"no name":       {Name: "../x", Kind: Flat, Host: "host1", Memory: 64 << 20},
		"no such host":  {Name: "x", Kind: Flat, Host: "host2", Memory: 64 << 20},
		"no such kind":  {Name: "x", Kind: "round", Host: "host1", Memory: 64 << 20},
		"needs 128 MiB": {Name: "x", Kind: Linux, Host: "host1", Memory: 64 << 20},
		"no such pat":   {Name: "x", Kind: Linux, Host: "host1", Memory: 256 << 20, Pattern: "zigzag"},
		"do not fit":    {Name: "x", Kind: Flat, Host: "host1", Memory: 64 << 20, WorkingSet: 64 << 20, DirtyRate: 1},
	} {
		if _, err := l.StartGuest(t.Context(), spec, func(string) {}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v, want one with %q", spec, err, want)
		}
	}
	if guests, err := l.Guests(); err != nil || len(guests) != 0 {
		t.Errorf("left behind: %+v, %v", guests, err)
	}
}

// Exec replaces the program, with the node's namespace and environment.
func TestExec(t *testing.T) {
	l := up(t, Options{Hosts: 1, NoAgents: true})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(self, "exec", l.dir, "host1", "sh", "-c", "echo $LMCTL_AGENT; cat /proc/net/dev; exit 7").Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Fatalf("exit: %v", err)
	}
	if s := string(out); !strings.HasPrefix(s, l.AgentSocket("host1")+"\n") || !strings.Contains(s, Bridge+":") {
		t.Errorf("on host1: %s", s)
	}
	if err := l.Exec("host3", []string{"true"}); err == nil {
		t.Error("a command runs on no host")
	}
	if err := l.Exec("host1", []string{"no-such-program-anywhere"}); err == nil {
		t.Error("a program that is not there runs")
	}
}
