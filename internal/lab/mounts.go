package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A host with libvirt has namespaces for its mounts and its name beside that for
// its network: libvirt has its folders at fixed places. They are held by bind
// mounts in the lab's folder, not by a process, so that whoever dies, they stay
// until Down unmounts them.

// pinDir is where the namespaces of hosts are held.
func pinDir(dir string) string { return filepath.Join(dir, "ns") }

func (l *Lab) pin(host, kind string) string {
	return filepath.Join(pinDir(l.dir), host+"."+kind)
}

// preparePins mounts what namespaces are held in. A mount namespace can be held
// only where mounts do not propagate, or it would come to hold itself.
func (l *Lab) preparePins() error {
	dir := pinDir(l.dir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := unix.Mount("lmctl-lab", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("lab: mount a tmpfs on %s: %w", dir, err)
	}
	if err := unix.Mount("", dir, "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("lab: make the mount on %s private: %w", dir, err)
	}
	// What is mounted in the storage later is to be seen by all hosts.
	if err := unix.Mount(l.Storage(), l.Storage(), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("lab: mount %s on itself: %w", l.Storage(), err)
	}
	if err := unix.Mount("", l.Storage(), "", unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("lab: make the mount on %s shared: %w", l.Storage(), err)
	}
	return l.makeKVMNode()
}

// makeKVMNode makes a /dev/kvm for hosts whose QEMU does not run as root: in a
// container it is often root's alone. As udev does, it gives it to the group
// kvm.
func (l *Lab) makeKVMNode() error {
	var st unix.Stat_t
	err := unix.Stat(kvmDevice, &st)
	if errors.Is(err, unix.ENOENT) || l.state.Libvirt.User == "root" {
		return nil
	}
	if err != nil {
		return fmt.Errorf("lab: %s: %w", kvmDevice, err)
	}
	gid, mode := 0, uint32(0o666)
	if g, err := user.LookupGroup("kvm"); err == nil {
		if gid, err = strconv.Atoi(g.Gid); err != nil {
			return fmt.Errorf("lab: group kvm: %w", err)
		}
		mode = 0o660
	}
	node := l.kvmNode()
	if err := unix.Mknod(node, unix.S_IFCHR|mode, int(st.Rdev)); err != nil {
		return fmt.Errorf("lab: make %s: %w", node, err)
	}
	if err := errors.Join(os.Chown(node, 0, gid), os.Chmod(node, fs.FileMode(mode))); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return nil
}

const (
	kvmDevice = "/dev/kvm"
	// hostsFile names the lab's hosts: libvirt looks its own host's name up, and
	// no name server is to be asked.
	hostsFile = "/etc/hosts"
)

func (l *Lab) kvmNode() string { return filepath.Join(pinDir(l.dir), "kvm") }

// bind is a path on a host and what is seen there.
type bind struct{ at, what string }

// binds are the folders of a host that are its own, in the order in which they
// are mounted.
func (l *Lab) binds(host string) []bind {
	own := l.libvirtDir(host)
	binds := []bind{
		{"/run", l.runRoot(host)}, // hides D-Bus, and with it the machine's services, from libvirt
		{"/dev/shm", l.MemoryDir(host)},
		{"/etc/libvirt", filepath.Join(own, "etc")},
		{"/var/lib/libvirt", filepath.Join(own, "lib")},
		{Images, l.Storage()},
		{"/var/log/libvirt", filepath.Join(own, "log")},
		{"/var/cache/libvirt", filepath.Join(own, "cache")},
	}
	if _, err := os.Lstat(hostsFile); err == nil {
		binds = append(binds, bind{hostsFile, filepath.Join(own, "hosts")})
	}
	if _, err := os.Lstat(l.kvmNode()); err == nil {
		binds = append(binds, bind{kvmDevice, l.kvmNode()})
	}
	extra := l.state.Libvirt.Installations[host].Binds
	targets := make([]string, 0, len(extra))
	for at := range extra {
		targets = append(targets, at)
	}
	slices.Sort(targets) // a folder before what is in it
	for _, at := range targets {
		binds = append(binds, bind{at, extra[at]})
	}
	return binds
}

// makeMounts makes a host's namespaces and holds them.
func (l *Lab) makeMounts(host string) error {
	made, held := make(chan int), make(chan struct{})
	failed := make(chan error, 1)
	go func() {
		failed <- onOwnThread(func() error {
			if err := l.arrangeMounts(host); err != nil {
				return err
			}
			made <- unix.Gettid()
			<-held
			return nil
		})
	}()
	var tid int
	select {
	case err := <-failed:
		return err
	case tid = <-made:
	}
	var errs []error
	for _, kind := range []string{"mnt", "uts"} {
		errs = append(errs, hold(fmt.Sprintf("/proc/self/task/%d/ns/%s", tid, kind), l.pin(host, kind)))
	}
	close(held)
	errs = append(errs, <-failed)
	return errors.Join(errs...)
}

// hold keeps a namespace for as long as it is mounted.
func hold(ns, at string) error {
	if err := os.WriteFile(at, nil, 0o600); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := unix.Mount(ns, at, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("lab: hold a namespace at %s: %w", at, err)
	}
	return nil
}

// arrangeMounts gives this thread the namespaces of a host, and mounts in them
// what is the host's own.
func (l *Lab) arrangeMounts(host string) error {
	if err := setNamespace(l.namespace(host)); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWUTS); err != nil {
		return fmt.Errorf("lab: make namespaces of %s: %w", host, err)
	}
	if err := unix.Sethostname([]byte(host)); err != nil {
		return fmt.Errorf("lab: name host %s: %w", host, err)
	}
	// What is mounted on the machine comes to the host, but not back.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("lab: mounts of %s: %w", host, err)
	}
	// A sysfs shows the network of whoever mounts it. The machine's cgroups go
	// with the old one: libvirt is to make none there.
	if err := unix.Unmount("/sys", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("lab: %s: unmount /sys: %w", host, err)
	}
	if err := unix.Mount("lmctl-lab", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("lab: %s: mount /sys: %w", host, err)
	}
	if err := l.state.Libvirt.Installations[host].layOver(); err != nil {
		return fmt.Errorf("lab: %s: %w", host, err)
	}
	// Named network namespaces stay what they are below the new /run.
	binds := append([]bind{{filepath.Join(l.runRoot(host), "netns"), netnsDir}}, l.binds(host)...)
	for _, b := range binds {
		if err := unix.Mount(b.what, b.at, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("lab: %s: mount %s on %s: %w", host, b.what, b.at, err)
		}
	}
	return nil
}

// onNode runs f on a thread that is in a node's namespaces; see inNamespace. The
// working directory is the same, where the node has it.
func (l *Lab) onNode(node string, f func() error) error {
	if !l.hasMounts(node) {
		return inNamespace(l.namespace(node), f)
	}
	return onOwnThread(func() error {
		if err := setNamespace(l.namespace(node)); err != nil {
			return err
		}
		if err := l.enterMounts(node); err != nil {
			return fmt.Errorf("lab: enter the namespaces of %s: %w", node, err)
		}
		return f()
	})
}

func (l *Lab) enterMounts(host string) error {
	cwd, err := os.Getwd()
	if err != nil {
		cwd = "/"
	}
	// Threads share their root and working directory, which a mount namespace
	// brings along.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("leave the other threads: %w", err)
	}
	for _, ns := range []struct {
		kind string
		flag int
	}{{"uts", unix.CLONE_NEWUTS}, {"mnt", unix.CLONE_NEWNS}} {
		if err := joinNamespace(l.pin(host, ns.kind), ns.flag); err != nil {
			return err
		}
	}
	if err := unix.Chdir(cwd); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%s: %w", cwd, err)
	}
	return nil
}

func joinNamespace(path string, flag int) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, flag); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// setNamespace puts this thread into a named network namespace.
func setNamespace(name string) error {
	h, err := netns.GetFromName(name)
	if err != nil {
		return fmt.Errorf("lab: network namespace %s: %w", name, err)
	}
	defer h.Close()
	if err := netns.Set(h); err != nil {
		return fmt.Errorf("lab: enter network namespace %s: %w", name, err)
	}
	return nil
}
