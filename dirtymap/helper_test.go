package dirtymap

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
	"github.com/lmctl/lmctl/internal/testenv"
)

// roleEnv makes the test binary play a part in a test instead of running any.
const roleEnv = "DIRTYMAP_TEST_ROLE"

var roles = map[string]func(args []string) error{
	"target": targetMain,
}

func init() { runtime.LockOSThread() } // roles run on the main thread

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		if err := roles[role](os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, role+":", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// requireTracking skips a test where the kernel cannot track.
func requireTracking(t testing.TB) {
	t.Helper()
	testenv.NeedTracker(t, Probe)
	testenv.NeedRoot(t) // for tracing other processes
}

// child is a process of the test, waited for by its pidfd first: see doc.go.
type child struct {
	Process
	cmd *exec.Cmd
	out *bufio.Reader
	in  io.WriteCloser
}

// start starts a command and ends it with the test.
func start(t testing.TB, cmd *exec.Cmd) *child {
	t.Helper()
	c := &child{cmd: cmd}
	var err error
	if c.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.out = bufio.NewReader(out)
	if cmd.Stderr == nil {
		cmd.Stderr = os.Stderr
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c.PID = cmd.Process.Pid
	if c.PIDFD, err = sys.OpenPidfd(c.PID); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// It may have ended as the test wanted; Wait says how, to nobody.
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		unix.Close(c.PIDFD)
	})
	return c
}

func startRole(t testing.TB, role string, args ...string) *child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	return start(t, cmd)
}

// line reads one line of the child's output.
func (c *child) line(t testing.TB) string {
	t.Helper()
	s, err := c.out.ReadString('\n')
	if err != nil {
		t.Fatalf("child %d said %q and no more: %v", c.PID, s, err)
	}
	return strings.TrimSpace(s)
}

// do has a target execute a command.
func (c *child) do(t testing.TB, format string, args ...any) {
	t.Helper()
	if _, err := fmt.Fprintf(c.in, format+"\n", args...); err != nil {
		t.Fatal(err)
	}
	if s := c.line(t); s != "ok" {
		t.Fatalf(format+": %s", append(args, s)...)
	}
}

// target is a process that maps a file of its own, shared, and does with its
// pages what it is told.
type target struct {
	*child
	Region Region
	path   string
}

// startTarget maps pages pages of a new file in dir, without touching any.
func startTarget(t testing.TB, dir string, pages int) *target {
	t.Helper()
	path := filepath.Join(dir, "memory")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
	if err := f.Truncate(int64(pages) * PageSize); err != nil {
		t.Fatal(err)
	}
	f.Close()
	return mapTarget(t, path, pages)
}

func mapTarget(t testing.TB, path string, pages int) *target {
	t.Helper()
	tg := &target{child: startRole(t, "target", path), path: path}
	tg.Region.Size = uint64(pages) * PageSize
	if _, err := fmt.Sscanf(tg.line(t), "%x", &tg.Region.Addr); err != nil {
		t.Fatal(err)
	}
	return tg
}

// shmDir is a directory in memory that the test owns.
func shmDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "dirtymap-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func targetMain(args []string) error {
	f, err := os.OpenFile(args[0], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	size := int(st.Size())
	// Room to align it by hand, as a hypervisor does.
	const align = 2 << 20
	room, err := unix.MmapPtr(-1, 0, nil, uintptr(size+align), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	aligned := unsafe.Add(room, (align-uintptr(room)%align)%align)
	p, err := unix.MmapPtr(int(f.Fd()), 0, aligned, uintptr(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED)
	if err != nil {
		return err
	}
	memory := unsafe.Slice((*byte)(p), size)
	fmt.Printf("%x\n", uintptr(p))
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if err := obey(int(f.Fd()), memory, lines.Text()); err != nil {
			fmt.Println(err)
		} else {
			fmt.Println("ok")
		}
	}
	return lines.Err()
}

var sink byte

// obey executes a command on pages lo to hi-1.
func obey(fd int, memory []byte, line string) error {
	var verb string
	var lo, hi int
	if _, err := fmt.Sscan(line, &verb, &lo, &hi); err != nil {
		return err
	}
	b := memory[lo*PageSize : hi*PageSize]
	switch verb {
	case "write":
		for i := 0; i < len(b); i += PageSize {
			b[i]++
		}
		return nil
	case "every2", "every12":
		step := 2
		if verb == "every12" {
			step = 12
		}
		for i := 0; i < len(b); i += step * PageSize {
			b[i]++
		}
		return nil
	case "read":
		for i := 0; i < len(b); i += PageSize {
			sink += b[i]
		}
		return nil
	case "dontneed":
		return unix.Madvise(b, unix.MADV_DONTNEED)
	case "remove":
		return unix.Madvise(b, unix.MADV_REMOVE)
	case "pageout":
		return unix.Madvise(b, unix.MADV_PAGEOUT)
	case "hugepage":
		return unix.Madvise(b, unix.MADV_HUGEPAGE)
	case "remap":
		_, err := unix.MmapPtr(fd, int64(lo)*PageSize, unsafe.Pointer(unsafe.SliceData(b)), uintptr(len(b)),
			unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED)
		return err
	case "split": // a change of protection inside a huge page splits it
		if err := unix.Mprotect(b, unix.PROT_READ); err != nil {
			return err
		}
		return unix.Mprotect(b, unix.PROT_READ|unix.PROT_WRITE)
	}
	return fmt.Errorf("unknown command %q", verb)
}
