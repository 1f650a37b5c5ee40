package deb

import (
	"context"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/testenv"
)

// bootTimeout bounds a system's way up. Machines that run tests are shared.
const bootTimeout = 2 * time.Minute

// root is a Debian of the test's own.
type root struct {
	t   *testing.T
	dir string
	pid int // of its init, once it is booted
}

// newRoot mounts one over the cached one. What is written to it is in memory.
func newRoot(t *testing.T) *root {
	t.Helper()
	testenv.NeedRoot(t)
	lower := testenv.NeedDebianRoot(t)
	base := t.TempDir()
	mount(t, "tmpfs", base, "tmpfs", "mode=755")
	dir := filepath.Join(base, "root")
	for _, d := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mount(t, "overlay", dir, "overlay", "lowerdir="+lower+",upperdir="+base+"/upper,workdir="+base+"/work")
	mount(t, "proc", filepath.Join(dir, "proc"), "proc", "")
	return &root{t: t, dir: dir}
}

func mount(t *testing.T, source, target, kind, data string) {
	t.Helper()
	if err := unix.Mount(source, target, kind, 0, data); err != nil {
		t.Fatalf("mount %s on %s: %v", kind, target, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", target, err)
		}
	})
}

// boot starts the root's systemd and waits until everything is started.
func (r *root) boot(name string) {
	r.t.Helper()
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(r.dir, "booted.sock")})
	if err != nil {
		r.t.Fatal(err)
	}
	defer socket.Close()
	log, err := os.Create(filepath.Join(r.t.TempDir(), "boot.log"))
	if err != nil {
		r.t.Fatal(err)
	}
	defer log.Close()
	group := newCgroup(r.t)
	defer group.Close()
	// The namespace of cgroups is made by one who is in the cgroup already.
	cmd := exec.Command("unshare", "--cgroup", "/bin/sh", "testdata/boot", r.dir, name)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS | syscall.CLONE_NEWNS,
		UseCgroupFD: true, CgroupFD: int(group.Fd()),
		Setsid: true,
	}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.pid = cmd.Process.Pid
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	r.t.Cleanup(func() {
		// The kernel ends all that is in a PID namespace with its init.
		if err := cmd.Process.Kill(); err == nil {
			<-ended
		}
	})
	if err := awaitReady(socket, ended); err != nil {
		text, _ := os.ReadFile(log.Name())
		r.t.Fatalf("boot %s: %v\n%s", name, err, text)
	}
}

// newCgroup makes a cgroup for a system that is booted: two that shared one would
// end each other's processes.
func newCgroup(t *testing.T) *os.File {
	t.Helper()
	base := t.TempDir()
	mount(t, "cgroup2", base, "cgroup2", "")
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	var own string
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			own = strings.TrimSpace(path)
		}
	}
	dir, err := os.MkdirTemp(filepath.Join(base, own), "lmctl-package-")
	if err != nil {
		t.Fatal(err)
	}
	// After its system has ended: what is cleaned up first was set up last.
	t.Cleanup(func() {
		if err := removeCgroups(dir); err != nil {
			t.Error(err)
		}
	})
	group, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return group
}

// removeCgroups removes a cgroup with those in it, whose files cannot be.
func removeCgroups(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroups(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return unix.Rmdir(dir)
}

// awaitReady waits for systemd's READY=1.
func awaitReady(socket *net.UnixConn, ended <-chan error) error {
	if err := socket.SetReadDeadline(time.Now().Add(bootTimeout)); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	for {
		n, err := socket.Read(buf)
		if err != nil {
			select {
			case end := <-ended:
				return end
			default:
				return err
			}
		}
		if slices.Contains(strings.Split(string(buf[:n]), "\n"), "READY=1") {
			return nil
		}
	}
}

// run runs a command in the root, in its namespaces if it is booted.
func (r *root) run(args ...string) (string, error) {
	argv := append([]string{"chroot", r.dir}, args...)
	if r.pid != 0 {
		argv = append([]string{"nsenter", "-t", strconv.Itoa(r.pid), "-m", "-p", "-n", "-u", "-i", "-C", "-r", "-w", "--"}, args...)
	}
	cmd := exec.CommandContext(r.t.Context(), argv[0], argv[1:]...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "MANPAGER=cat"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// do is a command that must succeed. It returns what was printed.
func (r *root) do(args ...string) string {
	r.t.Helper()
	out, err := r.run(args...)
	if err != nil {
		r.t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, out, r.journal())
	}
	return strings.TrimSpace(out)
}

// sh runs a line of shell.
func (r *root) sh(line string) string {
	r.t.Helper()
	return r.do("sh", "-euc", line)
}

func (r *root) journal() string {
	if r.pid == 0 {
		return ""
	}
	out, err := r.run("journalctl", "--no-pager", "-n", "40", "-u", "lmctl-agent")
	if err != nil {
		return err.Error()
	}
	return "\n" + out
}

// put writes a file into the root.
func (r *root) put(path, text string, mode fs.FileMode) {
	r.t.Helper()
	path = filepath.Join(r.dir, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		r.t.Fatal(err)
	}
}

// copyPackage puts the package that make deb has built into the root.
func (r *root) copyPackage() string {
	r.t.Helper()
	built, err := filepath.Glob("../../dist/lmctl_*.deb")
	if err != nil || len(built) != 1 {
		testenv.Missing(r.t, "the package", &fs.PathError{Op: "find one", Path: "dist/lmctl_*.deb (make deb)", Err: os.ErrNotExist})
	}
	text, err := os.ReadFile(built[0])
	if err != nil {
		r.t.Fatal(err)
	}
	r.put("/lmctl.deb", string(text), 0o644)
	return "/lmctl.deb"
}

// await runs a command again until what it prints is what is wanted.
func (r *root) await(what string, ok func(string) bool, args ...string) string {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), bootTimeout)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		out, err := r.run(args...)
		if err == nil && ok(out) {
			return strings.TrimSpace(out)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			r.t.Fatalf("%s: not within %v: %v\n%s%s", what, bootTimeout, err, out, r.journal())
		}
	}
}
