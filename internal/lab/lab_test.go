package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/testenv"
)

// TestMain makes this test binary stand in for lmctl: its verb agent is an
// agent that does nothing but answer on its socket, and exec is Lab.Exec.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "agent" {
		if err := standIn(os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 4 && os.Args[1] == "exec" {
		l, err := Open(os.Args[2])
		if err == nil {
			err = l.Exec(os.Args[3], os.Args[4:])
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if err := os.RemoveAll(built); built != "" && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func standIn(config string) error {
	b, err := os.ReadFile(config)
	if err != nil {
		return err
	}
	var c agentConfig
	if err := yaml.UnmarshalWithOptions(b, &c, yaml.Strict()); err != nil {
		return err
	}
	if os.Getenv("STAND_IN_FAILS") == c.Name {
		return fmt.Errorf("%s cannot start today", c.Name)
	}
	if err := os.Remove(c.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	tcp, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return err
	}
	defer tcp.Close()
	l, err := net.Listen("unix", c.Socket)
	if err != nil {
		return err
	}
	defer l.Close()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	<-ctx.Done()
	return nil
}

// shortDir is a folder whose path leaves room for socket names, which t.TempDir
// does not always.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lab")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "s")
}

func up(t *testing.T, o Options) *Lab {
	t.Helper()
	testenv.NeedRoot(t)
	if o.Dir == "" {
		o.Dir = shortDir(t)
	}
	l, err := Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Down(context.Background(), l.dir); err != nil {
			t.Error(err)
		}
	})
	return l
}

// nothingLeft is about all that a lab may leave on a machine.
func nothingLeft(t *testing.T, l *Lab) {
	t.Helper()
	if _, err := os.Lstat(l.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("state folder: %v", err)
	}
	if names, _ := filepath.Glob(filepath.Join(netnsDir, namespacePrefix(l.ID())+"*")); len(names) != 0 {
		t.Errorf("namespaces left: %q", names)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), l.dir) {
		t.Errorf("mounts left:\n%s", mounts)
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs { // one that ends meanwhile has none of these
		argv, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		mounts, _ := os.ReadFile(filepath.Join(p, "mountinfo"))
		cwd, _ := os.Readlink(filepath.Join(p, "cwd"))
		if strings.Contains(string(argv)+string(mounts)+cwd, l.dir) {
			t.Errorf("process left: %s: %q in %s", p, argv, cwd)
		}
	}
}

func ownLinks(t *testing.T) []string {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		for _, ours := range []string{Bridge, switchBridge, uplink, Client, HostName(1)} {
			if l.Attrs().Name == ours {
				names = append(names, ours)
			}
		}
	}
	return names
}

// reach opens a TCP connection from one node to another.
func reach(t *testing.T, l *Lab, from, to string, patience time.Duration) error {
	t.Helper()
	for _, a := range []string{addressOf(to, 0), addressOf(to, 1)} {
		var lis net.Listener
		if err := l.In(to, func() (err error) {
			lis, err = net.Listen("tcp", net.JoinHostPort(a, "0"))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		c, err := l.Dial(ctx, from, "tcp", lis.Addr().String())
		cancel()
		lis.Close()
		if err != nil {
			return err
		}
		c.Close()
	}
	return nil
}

func addressOf(node string, family int) string {
	n := hostNumber(node)
	if node == Client {
		n = clientNumber
	}
	return addresses(n)[family].Addr().String()
}

func TestNetwork(t *testing.T) {
	testenv.NeedRoot(t)
	before := ownLinks(t)
	l := up(t, Options{Hosts: 3, NoAgents: true})
	for _, pair := range [][2]string{{"host1", "host2"}, {"host3", "host1"}, {Client, "host2"}, {"host2", Client}} {
		if err := reach(t, l, pair[0], pair[1], 20*time.Second); err != nil {
			t.Errorf("%s to %s: %v", pair[0], pair[1], err)
		}
	}
	if err := l.Cut("host2"); err != nil {
		t.Fatal(err)
	}
	if err := reach(t, l, "host1", "host2", 300*time.Millisecond); err == nil {
		t.Error("a cut link carries")
	}
	if err := reach(t, l, "host1", "host3", 20*time.Second); err != nil {
		t.Errorf("cutting host2 harms others: %v", err)
	}
	if err := l.Heal("host2"); err != nil {
		t.Fatal(err)
	}
	if err := reach(t, l, "host1", "host2", 20*time.Second); err != nil {
		t.Errorf("a healed link does not carry: %v", err)
	}
	if sent, received, err := l.Traffic("host1"); err != nil || sent == 0 || received == 0 {
		t.Errorf("traffic of host1: %d, %d, %v", sent, received, err)
	}
	if after := ownLinks(t); !slices.Equal(before, after) {
		t.Errorf("in the machine's own namespace: %q, before the lab %q", after, before)
	}
	if err := l.Cut("host9"); err == nil {
		t.Error("a host that is not there is cut off")
	}
	if before, after := withPort(t, l, "host1"); before != after {
		t.Errorf("the bridge of host1 had the address %s, and with a guest's card %s", before, after)
	}
	if err := Down(t.Context(), l.dir); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, l)
}

// withPort is the hardware address of a host's bridge before and after it has got a
// card like those that libvirt makes for guests.
func withPort(t *testing.T, l *Lab, host string) (before, after string) {
	t.Helper()
	err := l.with(host, func(h *netlink.Handle) error {
		address := func() string {
			link, err := h.LinkByName(Bridge)
			if err != nil {
				t.Fatal(err)
			}
			return link.Attrs().HardwareAddr.String()
		}
		before = address()
		tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "vnet0"}, Mode: netlink.TUNTAP_MODE_TAP}
		if err := l.In(host, func() error { return netlink.LinkAdd(tap) }); err != nil {
			return err
		}
		link, err := h.LinkByName("vnet0")
		if err != nil {
			return err
		}
		if err := h.LinkSetHardwareAddr(link, net.HardwareAddr{0xfe, 0x54, 0, 0, 0, 1}); err != nil {
			return err
		}
		err = enslave(h, "vnet0", Bridge)
		after = address()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return before, after
}

func TestLabsCoexist(t *testing.T) {
	one, two := up(t, Options{Hosts: 1, NoAgents: true}), up(t, Options{Hosts: 1, NoAgents: true})
	if err := Down(t.Context(), one.dir); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, one)
	if err := reach(t, two, Client, "host1", 20*time.Second); err != nil {
		t.Errorf("one lab's end harms another: %v", err)
	}
}

func TestAgents(t *testing.T) {
	l := up(t, Options{MemoryLimit: 8 << 20, DiskLimit: 16 << 20})
	again, err := Open(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range again.Hosts() {
		if runs, err := again.AgentRuns(host); err != nil || !runs {
			t.Errorf("agent of %s runs: %v, %v", host, runs, err)
		}
		for dir, size := range map[string]uint64{l.MemoryDir(host): 8 << 20, l.StateDir(host): 16 << 20} {
			var fs unix.Statfs_t
			if err := unix.Statfs(dir, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC || fs.Blocks*uint64(fs.Bsize) != size {
				t.Errorf("%s of %s: %+v, %v", dir, host, fs, err)
			}
		}
		if c, err := l.Dial(t.Context(), Client, "tcp", l.agentAddress(host)); err != nil {
			t.Errorf("the agent of %s is not in its namespace: %v", host, err)
		} else {
			c.Close()
		}
	}
	if _, err := Up(t.Context(), Options{Dir: l.dir}); !errors.Is(err, ErrUp) {
		t.Errorf("a second lab in the same folder: %v", err)
	}
	if err := again.StartAgent(t.Context(), "host1"); err == nil {
		t.Error("a second agent starts")
	}
	for _, end := range []func(context.Context, string) error{again.KillAgent, again.StopAgent} {
		if err := end(t.Context(), "host1"); err != nil {
			t.Fatal(err)
		}
		if runs, err := again.AgentRuns("host1"); err != nil || runs {
			t.Errorf("after its end the agent runs: %v, %v", runs, err)
		}
		if err := end(t.Context(), "host1"); !errors.Is(err, errNotRunning) {
			t.Errorf("ended twice: %v", err)
		}
		if err := again.StartAgent(t.Context(), "host1"); err != nil {
			t.Fatal(err)
		}
	}
	if err := again.KillAgent(t.Context(), "host2"); err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]string{{"the agent of host2"}, nil} {
		if started, err := again.StartDead(t.Context()); err != nil || !slices.Equal(started, want) {
			t.Errorf("dead agents started: %v, %v, want %v", started, err, want)
		}
	}
	if err := again.StartAgent(t.Context(), "host7"); err == nil {
		t.Error("an agent starts on no host")
	}
	if err := Down(t.Context(), l.dir); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, l)
	if err := Down(t.Context(), l.dir); err != nil {
		t.Errorf("down twice: %v", err)
	}
}

func TestAgentThatFails(t *testing.T) {
	testenv.NeedRoot(t)
	dir := shortDir(t)
	_, err := Up(t.Context(), Options{Dir: dir, AgentEnv: []string{"STAND_IN_FAILS=host2"}})
	if err == nil || !strings.Contains(err.Error(), "host2 cannot start today") {
		t.Errorf("error %v, want the agent's own words", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}

func TestCommands(t *testing.T) {
	l := up(t, Options{Hosts: 1, NoAgents: true})
	out, err := l.Output(t.Context(), "host1", "sh", "-c", "echo $LMCTL_AGENT $LMCTL_LAB; cat /proc/net/dev")
	if err != nil {
		t.Fatal(err)
	}
	if s := string(out); !strings.HasPrefix(s, l.AgentSocket("host1")+" "+l.dir+"\n") || !strings.Contains(s, Bridge+":") {
		t.Errorf("on host1: %s", s)
	}
	out, err = l.Output(t.Context(), Client, "sh", "-c", "echo agent=$LMCTL_AGENT; exit 3")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || string(out) != "agent=\n" {
		t.Errorf("on the client: %q, %v", out, err)
	}
	if _, err := l.Output(t.Context(), "host2", "true"); err == nil {
		t.Error("a command runs on no host")
	}
}

// Down ends what runs in a lab, whoever started it.
func TestDownEndsStrangers(t *testing.T) {
	l := up(t, Options{Hosts: 1, NoAgents: true})
	cmd := exec.Command("sleep", "1000")
	if err := l.Start("host1", cmd); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if err := Down(t.Context(), l.dir); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := <-ended; !errors.As(err, &exit) {
		t.Errorf("the command ended by itself: %v", err)
	}
	nothingLeft(t, l)
}

// However far Up had come when it crashed, Down and another Up clean up.
func TestAfterCrash(t *testing.T) {
	testenv.NeedRoot(t)
	stages := []func(*Lab) error{
		func(l *Lab) error { return os.MkdirAll(l.dir, 0o700) },
		func(l *Lab) error { return l.save() },
		func(l *Lab) error { return l.makeFolders() },
		func(l *Lab) error { return makeNamespace(l.namespace(switchNode)) },
		func(l *Lab) error { return os.WriteFile(filepath.Join(netnsDir, l.namespace("host1")), nil, 0o400) },
	}
	for n := range len(stages) + 1 {
		for what, clean := range map[string]func(dir string) error{
			"down": func(dir string) error { return Down(t.Context(), dir) },
			"up": func(dir string) error {
				next, err := Up(t.Context(), Options{Dir: dir, Hosts: 1, NoAgents: true})
				if err != nil {
					return err
				}
				return Down(t.Context(), next.dir)
			},
		} {
			t.Run(fmt.Sprintf("%s after %d stages", what, n), func(t *testing.T) {
				l, err := newLab(Options{Dir: shortDir(t), Hosts: 1})
				if err != nil {
					t.Fatal(err)
				}
				for _, stage := range stages[:n] {
					if err := stage(l); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := Open(l.dir); !errors.Is(err, ErrNone) {
					t.Errorf("a half-made lab opens: %v", err)
				}
				if err := clean(l.dir); err != nil {
					t.Fatal(err)
				}
				nothingLeft(t, l)
			})
		}
	}
}

func TestForeignFolderIsLeftAlone(t *testing.T) {
	testenv.NeedRoot(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "thesis")
	if err := os.WriteFile(file, []byte("years of work"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Down(t.Context(), dir); err == nil {
		t.Error("down of a foreign folder is no error")
	}
	if _, err := Up(t.Context(), Options{Dir: dir, NoAgents: true}); err == nil {
		t.Error("a lab is made in a foreign folder")
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

func TestOptionsRefused(t *testing.T) {
	testenv.NeedRoot(t)
	for _, o := range []Options{{Hosts: -1}, {Hosts: MaxHosts + 1}, {MemoryLimit: -1}, {DiskLimit: -1}} {
		o.Dir = filepath.Join(t.TempDir(), "lab")
		if _, err := Up(t.Context(), o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
}

func TestHostNumber(t *testing.T) {
	for name, want := range map[string]int{"host1": 1, "host50": 50, "host0": 0, "host01": 0, "host": 0, "client": 0, "host-1": 0, "host1x": 0} {
		if got := hostNumber(name); got != want {
			t.Errorf("hostNumber(%q) = %d, want %d", name, got, want)
		}
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{`/a\040b`: "/a b", `/a`: "/a", `/a\`: `/a\`, `/a\9zz`: `/a\9zz`} {
		if got := unescape(in); got != want {
			t.Errorf("unescape(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestFileOffset(t *testing.T) {
	for _, tt := range []struct {
		gpa     uint64
		memory  int64
		machine string
		want    int64 // -1 for an error
	}{
		{0x1000, 256 << 20, "", 0x1000},
		{0, 256 << 20, "", -1},
		{256 << 20, 256 << 20, "", -1},
		{4<<30 + 0x5000, 6 << 30, "pc-i440fx-7.2", 3<<30 + 0x5000},
		{4<<30 + 0x5000, 6 << 30, "pc-q35-7.2", 2<<30 + 0x5000},
		{0xb0000000, 0xc0000000, "", 0xb0000000},
	} {
		got, err := fileOffset(tt.gpa, Guest{GuestSpec: GuestSpec{Memory: tt.memory, Machine: tt.machine}})
		if tt.want < 0 && err == nil || tt.want >= 0 && (err != nil || got != tt.want) {
			t.Errorf("%+v: %#x, %v", tt, got, err)
		}
	}
}

// The main thread never ends, so it must never be where a namespace was
// entered: /proc/PID/ns would say that the process is there.
func TestNotOnMainThread(t *testing.T) {
	for range 200 {
		if err := onOwnThread(func() error {
			if unix.Gettid() == os.Getpid() {
				return errors.New("on the main thread")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
}
