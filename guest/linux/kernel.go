package linux

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// metaPackage is Debian's package that depends on the current cloud kernel.
const metaPackage = "linux-image-cloud-amd64"

// wanted are the modules that guests need, beside those that these need.
var wanted = []string{"virtio_pci", "virtio_net", "virtio_blk", "virtio_balloon"}

// Kernel is an unpacked kernel.
type Kernel struct {
	Release string // as uname -r says it
	Image   string // path, for QEMU's -kernel
	Modules string // a folder of modules, with the file order
}

// ErrNoKernel says that no kernel is in the cache.
var ErrNoKernel = errors.New("no kernel in the cache")

// CacheDir is where kernels are kept: $LMCTL_CACHE, or a folder of the system's
// for root and of the user's for others.
func CacheDir() (string, error) {
	if dir := os.Getenv("LMCTL_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	if os.Getuid() == 0 {
		return "/var/cache/lmctl", nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("cache folder: %w", err)
	}
	return filepath.Join(dir, "lmctl"), nil
}

// FindKernel returns the kernel in a cache folder, or ErrNoKernel.
func FindKernel(cache string) (Kernel, error) {
	images, err := filepath.Glob(filepath.Join(cache, "kernel", "*", "vmlinuz"))
	if err != nil {
		return Kernel{}, fmt.Errorf("kernel: %w", err)
	}
	if len(images) == 0 {
		return Kernel{}, fmt.Errorf("%w %s", ErrNoKernel, cache)
	}
	return kernelIn(filepath.Dir(images[len(images)-1])), nil
}

func kernelIn(dir string) Kernel {
	return Kernel{Release: filepath.Base(dir), Image: filepath.Join(dir, "vmlinuz"), Modules: filepath.Join(dir, "modules")}
}

// FetchKernel returns the kernel in a cache folder. If there is none it gets
// Debian's with apt-get download, which installs nothing, telling say what it
// does.
func FetchKernel(ctx context.Context, cache string, say func(string)) (Kernel, error) {
	if err := os.MkdirAll(filepath.Join(cache, "kernel"), 0o755); err != nil {
		return Kernel{}, fmt.Errorf("kernel: %w", err)
	}
	unlock, err := lockDir(ctx, cache)
	if err != nil {
		return Kernel{}, err
	}
	defer unlock()
	k, err := FindKernel(cache)
	if !errors.Is(err, ErrNoKernel) {
		return k, err
	}
	for _, tool := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return Kernel{}, fmt.Errorf("kernel: it comes from Debian's package %s, and this machine has no %s: put vmlinuz and modules of a Debian machine into %s/kernel/RELEASE",
				metaPackage, tool, cache)
		}
	}
	name, err := packageName(ctx, say)
	if err != nil {
		return Kernel{}, err
	}
	say("downloading " + name + " from Debian into " + cache + " (nothing is installed)")
	return unpack(ctx, cache, name)
}

// lockDir keeps other processes from filling the same cache. The lock goes with
// the process.
func lockDir(ctx context.Context, cache string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("kernel: %w", err)
	}
	locked := make(chan error, 1)
	go func() { locked <- unix.Flock(int(f.Fd()), unix.LOCK_EX) }()
	select {
	case err = <-locked:
	case <-ctx.Done():
		// The goroutine still waits for the lock: it closes the file when it
		// has it.
		go func() { <-locked; f.Close() }()
		return nil, fmt.Errorf("kernel: wait for whoever fills %s: %w", cache, ctx.Err())
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("kernel: lock %s: %w", cache, err)
	}
	return func() { f.Close() }, nil
}

// packageName asks apt which package holds the current kernel.
func packageName(ctx context.Context, say func(string)) (string, error) {
	out, err := tool(ctx, "", "apt-cache", "depends", "--important", metaPackage)
	if name := parseDepends(out); err == nil && name != "" {
		return name, nil
	}
	say("apt does not know " + metaPackage + " yet: apt-get update")
	if _, err := tool(ctx, "", "apt-get", "update", "-q"); err != nil {
		return "", err
	}
	out, err = tool(ctx, "", "apt-cache", "depends", "--important", metaPackage)
	if err != nil {
		return "", err
	}
	if name := parseDepends(out); name != "" {
		return name, nil
	}
	return "", fmt.Errorf("kernel: apt knows no package that %s depends on: is this Debian on amd64?", metaPackage)
}

// parseDepends finds the kernel among what apt-cache depends has printed.
func parseDepends(out string) string {
	for line := range strings.Lines(out) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok && strings.HasPrefix(name, "linux-image-") {
			return name
		}
	}
	return ""
}

func unpack(ctx context.Context, cache, name string) (Kernel, error) {
	tmp, err := os.MkdirTemp(cache, "unpack-")
	if err != nil {
		return Kernel{}, fmt.Errorf("kernel: %w", err)
	}
	defer os.RemoveAll(tmp)
	// Root's apt would hand the download to a user who cannot write here.
	if _, err := tool(ctx, tmp, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name); err != nil {
		return Kernel{}, err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return Kernel{}, fmt.Errorf("kernel: apt-get download %s left %d packages", name, len(debs))
	}
	root := filepath.Join(tmp, "root")
	if _, err := tool(ctx, tmp, "dpkg-deb", "-x", debs[0], root); err != nil {
		return Kernel{}, err
	}
	release := strings.TrimSuffix(strings.TrimPrefix(name, "linux-image-"), "-unsigned")
	final := filepath.Join(cache, "kernel", release)
	if err := keep(root, release, filepath.Join(tmp, "keep")); err != nil {
		return Kernel{}, err
	}
	if err := os.Rename(filepath.Join(tmp, "keep"), final); err != nil {
		return Kernel{}, fmt.Errorf("kernel: %w", err)
	}
	return kernelIn(final), nil
}

// keep copies from an unpacked package what guests need.
func keep(root, release, dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, "modules"), 0o755); err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	if err := copyFile(filepath.Join(dir, "vmlinuz"), filepath.Join(root, "boot", "vmlinuz-"+release)); err != nil {
		return err
	}
	modules, err := closure(filepath.Join(root, "lib", "modules", release, "kernel"), wanted)
	if err != nil {
		return err
	}
	var order strings.Builder
	for _, path := range modules {
		if err := copyFile(filepath.Join(dir, "modules", filepath.Base(path)), path); err != nil {
			return err
		}
		order.WriteString(filepath.Base(path) + "\n")
	}
	if err := os.WriteFile(filepath.Join(dir, "modules", "order"), []byte(order.String()), 0o644); err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	return nil
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fs.FileMode(0o644))
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close()); err != nil {
		return fmt.Errorf("kernel: copy %s: %w", from, err)
	}
	return nil
}

// tool runs a program in dir and returns what it printed.
func tool(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("kernel: %s: %w: %s", strings.Join(append([]string{name}, args...), " "), err, strings.TrimSpace(said.String()))
	}
	return string(out), nil
}
