package lab

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/sys"
	"github.com/lmctl/lmctl/internal/testenv"
)

// upLibvirt makes a lab whose hosts have libvirt, with agents that only stand
// in.
func upLibvirt(t *testing.T, o Options) *Lab {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedQEMU(t)
	testenv.NeedTool(t, "virsh")
	if _, err := findDaemon("libvirtd", ""); err != nil {
		testenv.Missing(t, "libvirtd", err)
	}
	o.Hypervisor = Libvirt
	l := up(t, o)
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, host := range l.Hosts() {
			for _, d := range l.Daemons() {
				t.Logf("%s of %s: %s", d, host, l.lastWords(host, d))
			}
		}
	})
	return l
}

func virsh(t *testing.T, l *Lab, host string, args ...string) string {
	t.Helper()
	out, err := l.Output(t.Context(), host, append([]string{"virsh"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// Each host's libvirt is its own, and sees nothing of the machine's.
func TestLibvirtHosts(t *testing.T) {
	l := upLibvirt(t, Options{Libvirt: LibvirtOptions{Virtlogd: true}})
	for _, host := range l.Hosts() {
		if got := virsh(t, l, host, "hostname"); got != host {
			t.Errorf("libvirt of %s says that it is on %q", host, got)
		}
		if got := virsh(t, l, host, "net-list", "--all", "--name"); got != "" {
			t.Errorf("%s has networks that nobody made: %q", host, got)
		}
		for _, d := range l.Daemons() {
			if runs, err := l.DaemonRuns(host, d); err != nil || !runs {
				t.Errorf("%s of %s runs: %v, %v", d, host, runs, err)
			}
		}
		out, err := l.Output(t.Context(), host, "ls", "/run", "/sys/class/net", "/etc/libvirt")
		if err != nil || strings.Contains(string(out), "dbus") || !strings.Contains(string(out), Bridge) || !strings.Contains(string(out), "qemu.conf") {
			t.Errorf("%s sees %q, %v", host, out, err)
		}
	}
	other := HostName(2)
	uri := "qemu+tcp://" + addressOf(other, 0) + "/system"
	if got := virsh(t, l, HostName(1), "-c", uri, "hostname"); got != other {
		t.Errorf("%s is libvirt of %q", uri, got)
	}
	for _, path := range []string{"/run/libvirt/libvirt-sock", "/dev/shm", "/var/lib/libvirt/images", "/etc/hostname"} {
		outside := l.Outside(other, path)
		if err := l.In(other, func() error { return sameFile(path, outside) }); err != nil {
			t.Error(err)
		}
		if own := strings.HasPrefix(outside, l.Dir()); own == (path == "/etc/hostname") {
			t.Errorf("%s of %s is %s", path, other, outside)
		}
	}
	sharesStorage(t, l)
	status, err := l.Status(t.Context())
	if err != nil || len(status.Hosts) != 2 || !slices.Equal(status.Hosts[0].Daemons, []DaemonStatus{
		{Virtlogd, true, l.DaemonLog("host1", Virtlogd)}, {Libvirtd, true, l.DaemonLog("host1", Libvirtd)}, {Agent, true, l.AgentLog("host1")},
	}) {
		t.Errorf("status %+v, %v", status.Hosts, err)
	}
	down(t, l)
}

// sharesStorage sees that what is mounted in the storage is seen by all hosts.
func sharesStorage(t *testing.T, l *Lab) {
	t.Helper()
	at := filepath.Join(l.Storage(), "later")
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("lmctl-test", at, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(at, "file"), nil, 0o600); err != nil {
		t.Error(err)
	}
	for _, host := range l.Hosts() {
		if _, err := l.Output(t.Context(), host, "test", "-e", Images+"/later/file"); err != nil {
			t.Errorf("%s does not see what was mounted in the storage: %v", host, err)
		}
	}
	if err := unix.Unmount(at, 0); err != nil {
		t.Error(err)
	}
}

// sameFile says how two paths are not the same file. It is for a thread that
// sees both.
func sameFile(a, b string) error {
	i, err := os.Stat(a)
	if err != nil {
		return err
	}
	j, err := os.Stat(b)
	if err == nil && !os.SameFile(i, j) {
		err = fmt.Errorf("%s is not %s", a, b)
	}
	return err
}

// down removes a lab and sees that nothing of it is left.
func down(t *testing.T, l *Lab) {
	t.Helper()
	if err := Down(t.Context(), l.dir); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, l)
}

// Whatever of a host dies, its guests and its mounts stay, and all can be
// started again.
func TestLibvirtHostSurvives(t *testing.T) {
	testenv.NeedKVM(t)
	l := upLibvirt(t, Options{Libvirt: LibvirtOptions{Virtlogd: true}, NoAgents: true})
	g := start(t, l, GuestSpec{Name: "flat", Kind: Flat, Host: "host1", Memory: 128 << 20, DirtyRate: 4 << 20})
	healthy(t, l, g, "host1")
	for _, d := range []Daemon{Libvirtd, Virtlogd} {
		if err := l.KillDaemon(t.Context(), "host1", d); err != nil {
			t.Fatal(err)
		}
		if err := l.KillDaemon(t.Context(), "host1", d); !errors.Is(err, errNotRunning) {
			t.Errorf("%s killed twice: %v", d, err)
		}
		m, err := l.OpenMemory("host1", g)
		if err != nil {
			t.Fatal(err)
		}
		v := Verdict{Guest: g.Name}
		err = goesOn(t.Context(), &v, func() (uint64, error) {
			st, err := flat.ReadState(m)
			return st.Counter, errors.Join(err, st.Err())
		})
		if err := errors.Join(err, m.Close()); err != nil || len(v.Problems) > 0 {
			t.Fatalf("without %s: %v, %q", d, err, v.Problems)
		}
	}
	again, err := Open(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	started, err := again.StartDead(t.Context())
	if want := []string{"the virtlogd of host1", "the libvirtd of host1", "the agent of host1", "the agent of host2"}; err != nil || !slices.Equal(started, want) {
		t.Errorf("started %q, %v, want %q", started, err, want)
	}
	if got := virsh(t, l, "host1", "domstate", g.Name); got != "running" {
		t.Errorf("its libvirt finds the guest %s", got)
	}
	down(t, l)
}

// Two hosts are two hosts to libvirt itself: it moves a guest from one to the
// other, by its own means.
func TestVirshMigrates(t *testing.T) {
	testenv.NeedKVM(t)
	l := upLibvirt(t, Options{NoAgents: true})
	g := start(t, l, GuestSpec{Name: "flat", Kind: Flat, Host: "host1", Memory: 128 << 20, DirtyRate: 4 << 20})
	before := healthy(t, l, g, "host1")
	// Unsafe: libvirt does not believe that two hosts share a file system of
	// one machine.
	virsh(t, l, "host1", "migrate", "--live", "--unsafe", "--persistent", "--undefinesource", g.Name, "qemu+tcp://host2/system")
	if v := healthy(t, l, g, "host2"); v.Counter <= before.Counter {
		t.Errorf("counter %d, which was %d before", v.Counter, before.Counter)
	}
	if got := virsh(t, l, "host1", "list", "--all", "--name"); got != "" {
		t.Errorf("the source still has %q", got)
	}
	if err := l.RemoveGuest(t.Context(), g.Name); err != nil {
		t.Fatal(err)
	}
	if got := virsh(t, l, "host2", "list", "--all", "--name"); got != "" {
		t.Errorf("removed, and still there: %q", got)
	}
	left, err := os.ReadDir(filepath.Join(l.MemoryDir("host2"), "libvirt", "qemu"))
	if err != nil || len(left) != 0 {
		t.Errorf("memory left: %v, %v", left, err)
	}
	down(t, l)
}

// QEMU runs as another user, as it does on most hosts.
func TestUnprivilegedQEMU(t *testing.T) {
	testenv.NeedKVM(t)
	const name = "libvirt-qemu"
	if _, err := user.Lookup(name); err != nil {
		testenv.Missing(t, "the user "+name, err)
	}
	for _, dynamic := range []bool{false, true} {
		t.Run(fmt.Sprintf("dynamic ownership %v", dynamic), func(t *testing.T) {
			l := upLibvirt(t, Options{NoAgents: true, Hosts: 1, Libvirt: LibvirtOptions{User: name, DynamicOwnership: dynamic}})
			g := start(t, l, GuestSpec{Name: "flat", Kind: Flat, Host: "host1", Memory: 64 << 20})
			healthy(t, l, g, "host1")
			pid, err := l.domainPID("host1", g.Name)
			if err != nil {
				t.Fatal(err)
			}
			if uid, ok, err := sys.Status(pid, "Uid"); err != nil || !ok || strings.HasPrefix(uid, "0") {
				t.Errorf("QEMU runs as %q, %v, %v", uid, ok, err)
			}
			if seccomp, ok, err := sys.Status(pid, "Seccomp"); err != nil || !ok || seccomp != "2" {
				t.Errorf("QEMU's sandbox: %q, %v, %v", seccomp, ok, err)
			}
			down(t, l)
		})
	}
}

func TestLibvirtOptionsRefused(t *testing.T) {
	testenv.NeedRoot(t)
	for _, o := range []Options{
		{Hypervisor: "xen"},
		{Hypervisor: Libvirt, Libvirt: LibvirtOptions{User: "nobody-at-all"}},
		{Hypervisor: Libvirt, Libvirt: LibvirtOptions{Group: "no-group-at-all"}},
		{Hypervisor: Libvirt, Libvirt: LibvirtOptions{QEMUConf: []string{"a = 1\nb = 2"}}},
		{Hypervisor: Libvirt, Libvirt: LibvirtOptions{Installations: map[string]Installation{"host9": {}}}},
		{Hypervisor: Libvirt, Libvirt: LibvirtOptions{Installations: map[string]Installation{"host1": {Binds: map[string]string{"usr": "/usr"}}}}},
		{Hypervisor: Libvirt, Libvirt: LibvirtOptions{Installations: map[string]Installation{"host1": {Layers: []string{"usr"}}}}},
		{Hypervisor: Libvirt, Libvirt: LibvirtOptions{Installations: map[string]Installation{"host1": {Layers: []string{"/usr:/etc"}}}}},
		{Hypervisor: Libvirt, Libvirt: LibvirtOptions{Installations: map[string]Installation{"host1": {Layers: []string{"/no/such/folder"}}}}},
		{Hypervisor: Libvirt, Libvirt: LibvirtOptions{Installations: map[string]Installation{"host1": {Layers: []string{"/proc/version"}}}}},
		{Hypervisor: Libvirt, Dir: "/run/lmctl-lab-that-is-hidden"},
	} {
		if o.Dir == "" {
			o.Dir = filepath.Join(t.TempDir(), "lab")
		}
		if _, err := Up(t.Context(), o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
		if _, err := os.Stat(o.Dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%+v leaves %s: %v", o, o.Dir, err)
		}
	}
}

// However far Up had come with hosts that have libvirt when it crashed, or when
// the machine did, Down and another Up clean up.
func TestLibvirtAfterCrash(t *testing.T) {
	stages := []func(*Lab) error{
		func(l *Lab) error { return errors.Join(os.MkdirAll(l.dir, 0o700), l.save()) },
		func(l *Lab) error { return l.makeFolders() },
		func(l *Lab) error { return l.makeNetwork() },
		func(l *Lab) error { return l.makeLibvirtFolders("host1") },
		func(l *Lab) error { return l.preparePins() },
		func(l *Lab) error { return l.makeMounts("host1") },
		func(l *Lab) error { return l.startAll(t.Context(), Libvirtd) },
		func(l *Lab) error { // all that is not on disk is lost
			if err := endProcesses(t.Context(), l.state.ID); err != nil {
				return err
			}
			return errors.Join(removeNamespaces(l.state.ID), unmountBelow(l.dir))
		},
	}
	upLibvirt(t, Options{Hosts: 1, NoAgents: true}) // for what it needs of the machine
	for n := range stages {
		t.Run(fmt.Sprintf("%d stages", n+1), func(t *testing.T) {
			l, err := newLab(Options{Dir: shortDir(t), Hosts: 1, Hypervisor: Libvirt})
			if err != nil {
				t.Fatal(err)
			}
			for _, stage := range stages[:n+1] {
				if err := stage(l); err != nil {
					t.Fatal(err)
				}
			}
			next, err := Up(t.Context(), Options{Dir: l.dir, Hosts: 1, NoAgents: true})
			if err != nil {
				t.Fatal(err)
			}
			down(t, next)
			nothingLeft(t, l)
		})
	}
}
