package linux

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/guest/workload"
	"github.com/lmctl/lmctl/internal/testenv"
)

// serial is a booted guest's console.
type serial struct {
	conn net.Conn
	in   *bufio.Reader
	mem  string
	cmd  *exec.Cmd
}

// bootGuest boots a guest under TCG, without network and with a disk.
func bootGuest(t *testing.T, s control.Settings) *serial {
	t.Helper()
	qemu := testenv.NeedQEMU(t)
	cache, err := CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	init, err := BuildInit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	boot, err := Prepare(t.Context(), cache, init, func(what string) { t.Log(what) })
	if err != nil {
		testenv.Missing(t, "Debian's cloud kernel", err)
	}
	testenv.TCG(t)
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 1<<20); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "console"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	g := &serial{mem: filepath.Join(dir, "mem")}
	g.cmd = exec.Command(qemu, "-accel", "tcg", "-machine", "pc,memory-backend=ram", "-nodefaults",
		"-vga", "none", "-display", "none", "-m", "256M", "-smp", "2",
		"-object", "memory-backend-file,id=ram,share=on,size=256M,mem-path="+g.mem,
		"-kernel", boot.Kernel, "-initrd", boot.Initrd, "-append", Console+" "+s.Cmdline(),
		"-drive", "if=virtio,format=raw,file="+disk,
		"-chardev", "socket,id=console,path="+l.Addr().String(), "-serial", "chardev:console")
	g.cmd.Stderr = t.Output()
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = g.cmd.Process.Kill() // it may have ended by itself
		_ = g.cmd.Wait()
	})
	if g.conn, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.conn.Close() })
	g.in = bufio.NewReader(g.conn)
	return g
}

// next waits for a line with a mark.
func (g *serial) next(t *testing.T, mark string) string {
	t.Helper()
	if err := g.conn.SetReadDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	for {
		line, err := g.in.ReadString('\n')
		if rest, ok := strings.CutPrefix(line, mark); ok {
			return rest
		}
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "LMCTL-") {
			t.Logf("console: %s", line)
		}
		if err != nil {
			t.Fatalf("console: wait for %q: %v", mark, err)
		}
	}
}

func (g *serial) do(t *testing.T, req control.Request) control.Status {
	t.Helper()
	line, err := json.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.conn.Write(append(line, '\n')); err != nil {
		t.Fatal(err)
	}
	st, err := control.ParseReply([]byte(g.next(t, control.ReplyMark)))
	if err != nil {
		t.Fatalf("%s: %v", req.Do, err)
	}
	return st
}

// A guest without network does all that it can, and says so on its console.
func TestGuestOnTCG(t *testing.T) {
	s := control.Defaults()
	s.Memory.WorkingSet, s.Static = 8<<20, 4<<20
	s.Device, s.Disk = "/dev/vda", control.DiskSetting{Rate: 20, Readers: 2}
	s.Report = time.Second
	g := bootGuest(t, s)
	var ready control.Status
	if err := json.Unmarshal([]byte(g.next(t, control.ReadyMark)), &ready); err != nil {
		t.Fatal(err)
	}
	if !ready.OK || ready.BootID == "" || ready.Memory.Setting != s.Memory {
		t.Errorf("ready: %+v", ready)
	}
	st := g.do(t, control.Request{Do: control.SetMemory, Memory: &control.MemorySetting{
		Rate: control.Unbounded, WorkingSet: 16 << 20, Pattern: control.Random, CheckRate: 64 << 20}})
	if st.Memory.Setting.WorkingSet != 16<<20 {
		t.Errorf("the setting did not take: %+v", st.Memory)
	}
	for st.Memory.Written < 20000 || st.Disk.Last < 20 || st.Disk.Checked < 20 {
		if err := json.Unmarshal([]byte(g.next(t, control.StatusMark)), &st); err != nil {
			t.Fatal(err)
		}
	}
	st = g.do(t, control.Request{Do: control.CheckAll})
	if !st.OK || len(st.Problems) != 0 || st.Memory.Mismatches != 0 || st.Disk.Mismatches != 0 || st.Disk.Errors != 0 || st.Memory.Sweeps == 0 {
		t.Errorf("after a check: %+v", st)
	}
	g.awaitTick(t, st.Clock.TickGPA)
	g.damage(t, s.Seed)
	if st = g.do(t, control.Request{Do: control.CheckAll}); st.OK || st.Memory.Mismatches == 0 {
		t.Errorf("damage to the guest's memory goes unseen: %+v", st)
	}
	g.do(t, control.Request{Do: control.PowerOff})
	g.ended(t)
}

// ended waits until the guest has powered off, and QEMU has ended with it.
func (g *serial) ended(t *testing.T) {
	t.Helper()
	if err := g.conn.SetReadDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	last, err := io.ReadAll(g.in)
	if err != nil {
		t.Fatalf("power off: %v; its last words: %q", err, last)
	}
	if err := g.cmd.Wait(); err != nil {
		t.Errorf("power off: %v", err)
	}
}

// awaitTick sees the guest's tick from outside.
func (g *serial) awaitTick(t *testing.T, gpa uint64) {
	t.Helper()
	f, err := os.Open(g.mem)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var first, now [4]byte
	if _, err := f.ReadAt(first[:], int64(gpa)); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); <-tick.C {
		if _, err := f.ReadAt(now[:], int64(gpa)); err != nil {
			t.Fatal(err)
		}
		if now != first {
			return
		}
	}
	t.Errorf("the word at %#x does not tick", gpa)
}

// damage finds a static page in the guest's memory and flips a bit of it.
func (g *serial) damage(t *testing.T, seed uint64) {
	t.Helper()
	f, err := os.OpenFile(g.mem, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	want, page := workload.StaticPage(seed, 7), make([]byte, workload.PageSize)
	for off := int64(0); off < st.Size(); off += workload.PageSize {
		if _, err := f.ReadAt(page, off); err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(page, want) {
			page[100] ^= 1
			if _, err := f.WriteAt(page[100:101], off+100); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("the static page is not in the guest's memory")
}
