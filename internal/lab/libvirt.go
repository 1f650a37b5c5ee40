package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
	"github.com/google/uuid"
)

// LibvirtURI is what a libvirt is called on its own host.
const LibvirtURI = "qemu:///system"

// Images is where the lab's storage is on hosts with libvirt, beside its own
// path: a QEMU that is not root can get there.
const Images = "/var/lib/libvirt/images"

// Paths on a host with libvirt.
const (
	libvirtSocket   = "/run/libvirt/libvirt-sock"
	virtlogdSocket  = "/run/libvirt/virtlogd-sock"
	libvirtTCPPort  = 16509
	libvirtFallback = "/usr/sbin" // where Debian has the daemons, not in everybody's PATH
)

// libvirtDir holds what is libvirt's own on a host.
func (l *Lab) libvirtDir(host string) string { return filepath.Join(l.DiskDir(host), "libvirt") }

// runRoot is /run of a host with libvirt.
func (l *Lab) runRoot(host string) string { return filepath.Join(l.HostDir(host), "run") }

// makeLibvirtHosts makes what a lab's hosts have more when they have libvirt.
func (l *Lab) makeLibvirtHosts() error {
	for _, host := range l.Hosts() {
		if err := l.makeLibvirtFolders(host); err != nil {
			return err
		}
		if err := l.seedCapabilities(host); err != nil {
			return err
		}
	}
	if err := l.preparePins(); err != nil {
		return err
	}
	for _, host := range l.Hosts() {
		if err := l.makeMounts(host); err != nil {
			return err
		}
	}
	return nil
}

// makeLibvirtFolders makes the folders that are seen on a host at libvirt's
// places, with its configuration.
func (l *Lab) makeLibvirtFolders(host string) error {
	own := l.libvirtDir(host)
	folders := []struct {
		path string
		mode fs.FileMode
	}{
		{l.runRoot(host), 0o755}, {filepath.Join(l.runRoot(host), "netns"), 0o755},
		{filepath.Join(l.runRoot(host), "lock"), 0o755}, {l.RunDir(host), 0o711},
		{own, 0o755}, {filepath.Join(own, "etc"), 0o700}, {filepath.Join(own, "lib"), 0o755},
		{filepath.Join(own, "lib", "images"), 0o711}, {filepath.Join(own, "log"), 0o755}, {filepath.Join(own, "log", "qemu"), 0o755}, {filepath.Join(own, "cache"), 0o755},
	}
	for _, f := range folders {
		// Whatever the umask: others than root are to get through.
		if err := errors.Join(os.MkdirAll(f.path, f.mode), os.Chmod(f.path, f.mode)); err != nil {
			return fmt.Errorf("lab: %w", err)
		}
	}
	for name, lines := range map[string][]string{
		"etc/libvirtd.conf": l.libvirtdConf(host), "etc/qemu.conf": l.qemuConf(host), "hosts": l.hostsLines(),
	} {
		if err := writeWhole(filepath.Join(own, name), []byte(strings.Join(lines, "\n")+"\n")); err != nil {
			return err
		}
	}
	if err := os.Chmod(filepath.Join(own, "hosts"), 0o644); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return nil
}

// hostsLines are what /etc/hosts says on hosts with libvirt.
func (l *Lab) hostsLines() []string {
	lines := []string{"127.0.0.1 localhost", "::1 localhost"}
	for _, host := range l.Hosts() {
		for _, a := range addresses(hostNumber(host)) {
			lines = append(lines, a.Addr().String()+" "+host)
		}
	}
	return lines
}

func (l *Lab) libvirtdConf(host string) []string {
	address := addresses(hostNumber(host))[0].Addr()
	return append([]string{
		fmt.Sprintf("host_uuid = %q", uuid.NewString()),
		`unix_sock_group = "root"`,
		`unix_sock_ro_perms = "0700"`,
		`unix_sock_rw_perms = "0700"`,
		`auth_unix_ro = "none"`,
		`auth_unix_rw = "none"`,
		// For virsh migrate between hosts. Nobody else is in the lab's network.
		`listen_tls = 0`,
		`listen_tcp = 1`,
		fmt.Sprintf(`tcp_port = "%d"`, libvirtTCPPort),
		fmt.Sprintf("listen_addr = %q", address),
		`auth_tcp = "none"`,
		`log_outputs = "3:stderr"`,
	}, l.state.Libvirt.LibvirtdConf...)
}

func (l *Lab) qemuConf(host string) []string {
	o := l.state.Libvirt
	address := addresses(hostNumber(host))[0].Addr()
	stdio := "file"
	if o.Virtlogd {
		stdio = "logd"
	}
	lines := []string{
		fmt.Sprintf("user = %q", o.User),
		fmt.Sprintf("group = %q", o.Group),
		fmt.Sprintf("dynamic_ownership = %d", number(o.DynamicOwnership)),
		`security_driver = "none"`,
		// What these would make is outside the lab.
		`namespaces = []`,
		`cgroup_controllers = []`,
		`hugetlbfs_mount = []`,
		fmt.Sprintf("memory_backing_dir = %q", memoryBackingDir),
		fmt.Sprintf("stdio_handler = %q", stdio),
		fmt.Sprintf("migration_address = %q", address),
		fmt.Sprintf("migration_host = %q", address),
	}
	if o.NoSandbox {
		lines = append(lines, "seccomp_sandbox = 0")
	}
	return append(lines, o.QEMUConf...)
}

// memoryBackingDir is where libvirt keeps the memory files of guests: the tmpfs
// at MemoryDir, as the host sees it.
const memoryBackingDir = "/dev/shm"

func number(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Outside is where a path on a host is for who is not on it; the same path if
// the host has no mounts of its own there.
func (l *Lab) Outside(host, path string) string {
	if !l.hasMounts(host) {
		return path
	}
	binds := l.binds(host)
	best := bind{}
	for _, b := range binds { // a later one may be below an earlier one
		if (path == b.at || strings.HasPrefix(path, b.at+"/")) && len(b.at) >= len(best.at) {
			best = b
		}
	}
	if best.at == "" {
		return path
	}
	return best.what + strings.TrimPrefix(path, best.at)
}

// libvirtdCommand is how a host's libvirtd is started.
func (l *Lab) libvirtdCommand(host string) (*exec.Cmd, error) {
	path, err := findDaemon("libvirtd", l.state.Libvirt.Installations[host].Libvirtd)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path, "--listen")
	cmd.Env = l.environment(host)
	return cmd, nil
}

func (l *Lab) virtlogdCommand(host string) (*exec.Cmd, error) {
	path, err := findDaemon("virtlogd", l.state.Libvirt.Installations[host].Virtlogd)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path)
	cmd.Env = l.environment(host)
	return cmd, nil
}

func findDaemon(name, given string) (string, error) {
	if given != "" {
		return given, nil
	}
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	if path, err2 := exec.LookPath(filepath.Join(libvirtFallback, name)); err2 == nil {
		return path, nil
	}
	return "", fmt.Errorf("lab: it needs libvirt (Debian: libvirt-daemon-system): %w", err)
}

// libvirtdAnswers tries whether a host's libvirtd is at work: it accepts
// connections before its drivers have come up, and answers when they have.
func (l *Lab) libvirtdAnswers(ctx context.Context, host string) error {
	v, err := l.ConnectLibvirt(ctx, host)
	if err != nil {
		return err
	}
	return v.Disconnect()
}

func (l *Lab) virtlogdAnswers(ctx context.Context, host string) error {
	c, err := l.Dial(ctx, host, "unix", virtlogdSocket)
	if err != nil {
		return err
	}
	return c.Close()
}

// ConnectLibvirt connects to a host's libvirtd from outside. The caller
// disconnects.
func (l *Lab) ConnectLibvirt(ctx context.Context, host string) (*libvirt.Libvirt, error) {
	if l.Hypervisor() != Libvirt {
		return nil, fmt.Errorf("lab: %s has no libvirt", host)
	}
	conn, err := l.Dial(ctx, host, "unix", libvirtSocket)
	if err != nil {
		return nil, err
	}
	// go-libvirt knows no context: a connection that is closed ends its wait.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	v := libvirt.NewWithDialer(dialers.NewAlreadyConnected(conn))
	if err := v.ConnectToURI(libvirt.QEMUSystem); err != nil {
		return nil, errors.Join(fmt.Errorf("lab: libvirt of %s: %w", host, err), closed(conn))
	}
	return v, nil
}

// closed closes a connection that somebody else may have closed already.
func closed(conn net.Conn) error {
	if err := conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
