package flat

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lmctl/lmctl/internal/testenv"
)

// machine is a flat guest under real KVM, for the life of a test.
type machine struct {
	mem, serial string
	cmd         *exec.Cmd
	stderr      strings.Builder
}

func startMachine(t *testing.T, cfg Config) *machine {
	t.Helper()
	testenv.NeedKVM(t)
	qemu := testenv.NeedQEMU(t)
	dir := t.TempDir()
	img, err := cfg.Image()
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, img, 0o600); err != nil {
		t.Fatal(err)
	}
	m := &machine{mem: filepath.Join(dir, "mem"), serial: filepath.Join(dir, "serial")}
	mib := cfg.Memory >> 20
	m.cmd = exec.Command(qemu, "-accel", "kvm", "-machine", "pc,memory-backend=ram", "-nodefaults",
		"-vga", "none", "-display", "none", "-m", strconv.FormatInt(mib, 10)+"M",
		"-object", "memory-backend-file,id=ram,share=on,mem-path="+m.mem+",size="+strconv.FormatInt(mib, 10)+"M",
		"-drive", "if=ide,format=raw,file="+disk, "-serial", "file:"+m.serial)
	m.cmd.Stderr = &m.stderr
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = m.cmd.Process.Kill()
		var exit *exec.ExitError
		if err := m.cmd.Wait(); err != nil && !errors.As(err, &exit) {
			t.Errorf("wait for QEMU: %v", err)
		}
		if t.Failed() {
			t.Logf("QEMU said: %s", m.stderr.String())
		}
	})
	return m
}

// await reads the guest's state until ok says that it is enough.
func (m *machine) await(t *testing.T, what string, ok func(State) bool) (*os.File, State) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	var f *os.File
	for ; time.Now().Before(deadline); <-tick.C {
		if f == nil {
			var err error
			if f, err = os.Open(m.mem); err != nil {
				continue // QEMU makes it once it has started
			}
			t.Cleanup(func() { f.Close() })
		}
		s, err := ReadState(f)
		if err == nil && s.Booted && ok(s) {
			return f, s
		}
	}
	t.Fatalf("the guest did not come to: %s", what)
	return nil, State{}
}

func (m *machine) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := m.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

func TestGuestOnKVM(t *testing.T) {
	for name, cfg := range map[string]Config{
		"unbounded": {Memory: 32 << 20, Pages: 2000, Rate: Unbounded},
		"random":    {Memory: 32 << 20, Pages: 1999, Rate: Unbounded, Pattern: Random},
		"paced":     {Memory: 32 << 20, Pages: 500, Rate: 2000},
		"rewrite":   {Memory: 32 << 20, Pages: 500, Rate: Unbounded, Pattern: Rewrite},
	} {
		t.Run(name, func(t *testing.T) {
			m := startMachine(t, cfg)
			f, s := m.await(t, "its third pass", func(s State) bool { return s.Pass >= 2 })
			for range 20 {
				if _, err := cfg.Check(f, false); err != nil {
					t.Fatal(err)
				}
			}
			m.signal(t, syscall.SIGSTOP)
			awaitStopped(t, m.cmd.Process.Pid)
			if _, err := cfg.Check(f, true); err != nil {
				t.Fatalf("stopped: %v", err)
			}
			m.signal(t, syscall.SIGCONT)
			m.await(t, "two passes more", func(now State) bool { return now.Pass-s.Pass >= 2 })
		})
	}
}

func TestIdleGuestOnKVM(t *testing.T) {
	cfg := Config{Memory: 32 << 20}
	m := startMachine(t, cfg)
	m.await(t, "two printed counters", func(s State) bool { return s.Counter > 2100 })
	out, err := os.ReadFile(m.serial)
	if err != nil {
		t.Fatal(err)
	}
	if want := "SC0000000000000400\nC0000000000000800\n"; string(out) != want {
		t.Errorf("serial port said %q, want %q", out, want)
	}
}

// A page that is not as the guest wrote it is found by the guest itself.
func TestGuestFindsDamage(t *testing.T) {
	cfg := Config{Memory: 32 << 20, Pages: 500, Rate: Unbounded}
	m := startMachine(t, cfg)
	m.await(t, "its loop", func(s State) bool { return s.Pass >= 1 })
	w, err := os.OpenFile(m.mem, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.WriteAt([]byte("damage"), cfg.addr(123)); err != nil {
		t.Fatal(err)
	}
	f, s := m.await(t, "finding the damage", func(s State) bool { return s.Failed })
	if int64(s.Addr) != cfg.addr(123) {
		t.Errorf("found at %#x, done at %#x", s.Addr, cfg.addr(123))
	}
	if _, err := cfg.Check(f, false); err == nil {
		t.Error("Check is content with a guest that is not")
	}
}

// A stop of the guest is at least as long to the probe as it was, and copying
// the counter to another file is no sign of life.
func TestProbeSeesStop(t *testing.T) {
	cfg := Config{Memory: 32 << 20, Pages: 500, Rate: Unbounded}
	m := startMachine(t, cfg)
	f, _ := m.await(t, "its loop", func(s State) bool { return s.Pass >= 1 })
	p := NewProbe(DefaultInterval)
	defer p.Close()
	if err := p.Add(m.mem, CounterAddr); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "copy")
	if err := os.WriteFile(other, make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.Add(other, CounterAddr); err != nil {
		t.Fatal(err)
	}
	awaitTrue(t, "the probe sees the guest", p.Moving)
	p.Reset()
	awaitTrue(t, "the probe sees the guest", p.Moving)

	m.signal(t, syscall.SIGSTOP)
	awaitStopped(t, m.cmd.Process.Pid)
	stopped := time.Now()
	s, err := ReadState(f)
	if err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(other, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	<-time.After(100 * time.Millisecond)
	if _, err := w.WriteAt([]byte{byte(s.Counter), byte(s.Counter >> 8)}, CounterAddr); err != nil {
		t.Fatal(err)
	}
	<-time.After(100 * time.Millisecond)
	least := time.Since(stopped)
	m.signal(t, syscall.SIGCONT)
	m.await(t, "going on", func(now State) bool { return now.Counter > s.Counter+100 })
	if g := p.Longest(); g.Length < least {
		t.Errorf("the guest stood still for %v at least, the probe saw %v", least, g.Length)
	}
}

func TestProbeRefuses(t *testing.T) {
	p := NewProbe(DefaultInterval)
	defer p.Close()
	file := filepath.Join(t.TempDir(), "small")
	if err := os.WriteFile(file, make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{p.Add(file, 100), p.Add(file, 2), p.Add(file, -4), p.Add(file+"x", 0)} {
		if err == nil {
			t.Error("a counter outside the file is accepted")
		}
	}
}

func awaitTrue(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); <-tick.C {
		if ok() {
			return
		}
	}
	t.Fatalf("did not come: %s", what)
}

// awaitStopped waits until every thread of a process has stopped.
func awaitStopped(t *testing.T, pid int) {
	t.Helper()
	awaitTrue(t, "all threads stopped", func() bool {
		tasks, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/stat")
		if err != nil || len(tasks) == 0 {
			return false
		}
		for _, task := range tasks {
			b, err := os.ReadFile(task)
			if err != nil {
				return false
			}
			_, rest, _ := strings.Cut(string(b), ") ")
			if !strings.HasPrefix(rest, "T") {
				return false
			}
		}
		return true
	})
}
