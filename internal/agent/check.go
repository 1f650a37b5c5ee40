package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/pki"
	"github.com/lmctl/lmctl/internal/sys"
)

const (
	pass = lmctlv1.CheckLine_VERDICT_PASS
	warn = lmctlv1.CheckLine_VERDICT_WARN
	fail = lmctlv1.CheckLine_VERDICT_FAIL
)

func line(name string, v lmctlv1.CheckLine_Verdict, detail, advice string) *lmctlv1.CheckLine {
	return &lmctlv1.CheckLine{Name: name, Verdict: v, Detail: detail, Advice: advice}
}

// check says, line by line, whether this host can do the job.
func (a *Agent) check(ctx context.Context) []*lmctlv1.CheckLine {
	lines := []*lmctlv1.CheckLine{
		checkTracker(), checkKVM(), a.checkMemory(), checkClock(),
		a.checkDirs("state folder", a.cfg.StateDir, false), a.checkDirs("run folder", a.cfg.RunDir, false),
		a.checkCertificate(), a.checkPort(ctx),
	}
	if a.foreign() {
		lines = append(lines, a.checkLibvirt(ctx)...)
	} else {
		lines = append(lines, checkQEMU(ctx), a.checkDirs("memory folder", a.cfg.MemoryDir, true))
	}
	lines = append(lines, a.checkBridges()...)
	return append(lines, a.checkPeers(ctx)...)
}

func checkTracker() *lmctlv1.CheckLine {
	err := dirtymap.Probe()
	switch {
	case err == nil:
		return line("dirty-page tracking", pass, "this kernel tracks a process's writes", "")
	case errors.Is(err, dirtymap.ErrPermission):
		return line("dirty-page tracking", fail, err.Error(), "run the agent as root, with CAP_SYS_PTRACE")
	}
	return line("dirty-page tracking", fail, err.Error(), "use Linux 6.7 or later on x86-64 with CONFIG_USERFAULTFD and CONFIG_PROC_PAGE_MONITOR")
}

func checkKVM() *lmctlv1.CheckLine {
	if err := openKVM(); err != nil {
		return line("KVM", warn, err.Error(), "guests run under TCG, slowly: switch virtualization on in the firmware, or nested virtualization in the hypervisor below, and load kvm_intel or kvm_amd")
	}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err == nil && !strings.Contains(string(info), " vmx") && !strings.Contains(string(info), " svm") {
		return line("KVM", warn, "/dev/kvm opens, but the CPU shows neither vmx nor svm", "instructions are emulated one by one: fit for tests only")
	}
	return line("KVM", pass, "/dev/kvm opens", "")
}

// minimumQEMU is the oldest QEMU that is tested.
var minimumQEMU = [2]int{7, 2}

func checkQEMU(ctx context.Context) *lmctlv1.CheckLine {
	version, err := qemuVersion(ctx)
	if err != nil {
		return line("QEMU", fail, err.Error(), "install qemu-system-x86")
	}
	parts := strings.SplitN(version, ".", 3)
	if len(parts) < 2 {
		return line("QEMU", warn, "version "+version+" is not understood", "")
	}
	major, merr := strconv.Atoi(parts[0])
	minor, nerr := strconv.Atoi(parts[1])
	if err := errors.Join(merr, nerr); err != nil {
		return line("QEMU", warn, "version "+version+" is not understood", "")
	}
	if major < minimumQEMU[0] || major == minimumQEMU[0] && minor < minimumQEMU[1] {
		return line("QEMU", warn, "version "+version, fmt.Sprintf("versions before %d.%d are not tested: upgrade", minimumQEMU[0], minimumQEMU[1]))
	}
	return line("QEMU", pass, "version "+version, "")
}

func (a *Agent) checkMemory() *lmctlv1.CheckLine {
	total, available, err := sys.Memory()
	if err != nil {
		return line("memory", fail, err.Error(), "mount /proc")
	}
	detail := fmt.Sprintf("%s of %s available", humanize.IBytes(uint64(available)), humanize.IBytes(uint64(total)))
	if available < int64(a.cfg.MemoryReserve) {
		return line("memory", warn, detail, "less than memory_reserve: no guest can come here")
	}
	return line("memory", pass, detail, "")
}

// clockUnsynchronized is the kernel's word for a clock that nobody disciplines.
const clockUnsynchronized = 5 // TIME_ERROR

func checkClock() *lmctlv1.CheckLine {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return line("time", warn, err.Error(), "")
	}
	if state == clockUnsynchronized || t.Status&unix.STA_UNSYNC != 0 {
		return line("time", warn, "the clock is not synchronized", "install chrony or systemd-timesyncd: certificates and logs of several hosts need one time")
	}
	return line("time", pass, fmt.Sprintf("synchronized, within %s", time.Duration(t.Maxerror)*time.Microsecond), "")
}

func (a *Agent) checkDirs(name, dir string, memory bool) *lmctlv1.CheckLine {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return line(name, fail, fmt.Sprintf("%s: %v", dir, err), "create it, or change the agent's configuration")
	}
	if err := unix.Access(dir, unix.W_OK); err != nil {
		return line(name, fail, fmt.Sprintf("%s: %v", dir, err), "make it writable for the agent")
	}
	free := fs.Bavail * uint64(fs.Bsize)
	detail := fmt.Sprintf("%s, %s free", dir, humanize.IBytes(free))
	switch {
	case memory && fs.Type != unix.TMPFS_MAGIC:
		return line(name, fail, detail+", not a tmpfs", "mount a tmpfs there, or choose a folder below /dev/shm")
	case !memory && free < 64<<20:
		return line(name, warn, detail, "make room: records and logs go there")
	}
	return line(name, pass, detail, "")
}

func (a *Agent) checkCertificate() *lmctlv1.CheckLine {
	if a.identity == nil {
		return line("certificate", warn, "none", "this agent talks to no other host: make a certificate with `lmctl pki issue`, set listen and peers")
	}
	left := time.Until(a.identity.Expires())
	detail := "valid until " + a.identity.Expires().Format(time.DateOnly)
	switch {
	case left <= 0:
		return line("certificate", fail, detail, "issue a new one with `lmctl pki issue` and restart the agent")
	case left < 30*24*time.Hour:
		return line("certificate", warn, detail, "issue a new one with `lmctl pki issue` and restart the agent")
	}
	return line("certificate", pass, detail, "")
}

// checkPort shakes hands with this agent's own port.
func (a *Agent) checkPort(ctx context.Context) *lmctlv1.CheckLine {
	if a.cfg.Listen == "" {
		return line("port", warn, "the agent does not listen", "set listen, so that other hosts can reach it")
	}
	host, port, err := net.SplitHostPort(a.cfg.Listen)
	if err != nil {
		return line("port", fail, err.Error(), "write listen as ADDRESS:PORT")
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	if err := a.handshake(ctx, net.JoinHostPort(host, port), a.cfg.Name); err != nil {
		return line("port", fail, err.Error(), "see the agent's log")
	}
	return line("port", pass, "answers at "+a.cfg.Listen, "")
}

// handshake proves that a host's agent answers at an address.
func (a *Agent) handshake(ctx context.Context, addr, host string) error {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.PeerTimeout)
	defer cancel()
	d := tls.Dialer{Config: a.identity.ClientConfig(pki.ALPNAPI, pki.Expect{Host: host})}
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	return conn.Close()
}

// hostBridges lists the bridges of this host. That there is none is worth a
// warning as long as no guest needs one: a guest that does fails its own line.
func hostBridges(needed bool) *lmctlv1.CheckLine {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // that one: others change at the same time
		return line("bridges", warn, fmt.Sprintf("list network interfaces: %v", err), "")
	}
	var names []string
	for _, l := range links {
		if l.Type() == "bridge" {
			names = append(names, l.Attrs().Name)
		}
	}
	slices.Sort(names)
	switch {
	case len(names) > 0:
		return line("bridges", pass, strings.Join(names, ", "), "")
	case needed:
		return line("bridges", warn, "none", "see the lines below")
	}
	return line("bridges", warn, "none", "make one, e.g. br0, for guests with network cards: ip link add br0 type bridge && ip link set br0 up")
}

// checkBridges looks for the bridges that this host has, and for those that its
// guests need.
func (a *Agent) checkBridges() []*lmctlv1.CheckLine {
	users := make(map[string][]string)
	for _, info := range a.driver.List() {
		for _, bridge := range info.Bridges {
			users[bridge] = append(users[bridge], info.Name)
		}
	}
	lines := []*lmctlv1.CheckLine{hostBridges(len(users) > 0)}
	for _, bridge := range slices.Sorted(maps.Keys(users)) {
		name, used := "bridge "+bridge, "used by "+strings.Join(users[bridge], ", ")
		ifi, err := net.InterfaceByName(bridge)
		switch {
		case err != nil:
			lines = append(lines, line(name, fail, used+": "+err.Error(), "create it: ip link add "+bridge+" type bridge"))
		case ifi.Flags&net.FlagUp == 0:
			lines = append(lines, line(name, fail, used+": it is down", "ip link set "+bridge+" up"))
		default:
			lines = append(lines, line(name, pass, used, ""))
		}
	}
	return lines
}

// checkPeers shakes hands with every other host and compares clocks.
func (a *Agent) checkPeers(ctx context.Context) []*lmctlv1.CheckLine {
	names := slices.Sorted(maps.Keys(a.cfg.Peers))
	lines := make([]*lmctlv1.CheckLine, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() { lines[i] = a.checkPeer(ctx, name) })
	}
	wg.Wait()
	return lines
}

// clockDifference is how far two hosts' clocks may be apart without a warning.
const clockDifference = 2 * time.Second

func (a *Agent) checkPeer(ctx context.Context, name string) *lmctlv1.CheckLine {
	title := "host " + name
	facts := a.peerFacts(ctx, name)
	if !facts.GetReachable() {
		return line(title, fail, facts.GetProblem(), "check that its agent runs, that "+a.cfg.Peers[name]+" is its address, and that no firewall is between")
	}
	off := time.Until(facts.GetTime().AsTime()).Abs()
	detail := fmt.Sprintf("answers in %s, agent %s, QEMU %s", facts.GetRoundTrip().AsDuration().Round(10*time.Microsecond), facts.GetAgentVersion(), facts.GetHypervisorVersion())
	if off > clockDifference+facts.GetRoundTrip().AsDuration() {
		return line(title, warn, fmt.Sprintf("%s; its clock is %s off", detail, off.Round(time.Millisecond)), "synchronize the clocks")
	}
	return line(title, pass, detail, "")
}
