package libvirt

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/lab/domain"
	"github.com/lmctl/lmctl/migrate"
)

// point is a state of a migration, on one side, that agents are held at.
type point struct {
	role  string
	state migrate.State
}

func (p point) String() string { return p.role + "-" + string(p.state) }

func (p point) file() string {
	return filepath.Join(failpoints(), p.role+"."+string(p.state))
}

// points are all states of a migration that succeeds.
func points() []point {
	var all []point
	for _, s := range []migrate.State{
		migrate.SourcePreparing, migrate.SourceTracking, migrate.SourceCopying, migrate.SourceSuspending,
		migrate.SourceFinalCopy, migrate.SourceReadyWait, migrate.SourceCommitting, migrate.SourceCommitted,
		migrate.SourceHandedOver, migrate.SourceReleasing,
	} {
		all = append(all, point{"source", s})
	}
	for _, s := range []migrate.State{
		migrate.DestPreparing, migrate.DestReceiving, migrate.DestFinal, migrate.DestLoading,
		migrate.DestReady, migrate.DestAccepted, migrate.DestRunning, migrate.DestOwned,
	} {
		all = append(all, point{"destination", s})
	}
	return all
}

// fault is something that goes wrong while a migration stands at a state.
type fault struct {
	name string
	do   func(*cell)
	undo func(*cell)     // restarts what died and heals what was cut
	at   []migrate.State // where everybody's tests do it
	// relay is where they do it in relay mode.
	relay []migrate.State
}

var faults = []fault{
	{
		name: "kill-source-agent", do: killer("host1", lab.Agent), undo: starter("host1", lab.Agent),
		at:    []migrate.State{migrate.SourceCopying, migrate.SourceFinalCopy, migrate.SourceCommitted},
		relay: []migrate.State{migrate.SourceCopying, migrate.SourceCommitted},
	},
	{
		name: "kill-destination-agent", do: killer("host2", lab.Agent), undo: starter("host2", lab.Agent),
		at:    []migrate.State{migrate.DestReceiving, migrate.DestReady, migrate.DestAccepted},
		relay: []migrate.State{migrate.DestReceiving, migrate.DestReady},
	},
	{
		name: "kill-source-libvirtd", do: killer("host1", lab.Libvirtd), undo: starter("host1", lab.Libvirtd),
		at:    []migrate.State{migrate.SourceCopying, migrate.SourceFinalCopy, migrate.SourceReleasing},
		relay: []migrate.State{migrate.SourceCopying},
	},
	{
		name: "kill-destination-libvirtd", do: killer("host2", lab.Libvirtd), undo: starter("host2", lab.Libvirtd),
		at: []migrate.State{migrate.DestReceiving, migrate.DestReady},
	},
	// The agent comes back before its libvirtd, and can ask nobody.
	{
		name: "kill-source-agent-and-libvirtd", do: killer("host1", lab.Agent, lab.Libvirtd), undo: starter("host1", lab.Agent, lab.Libvirtd),
		at: []migrate.State{migrate.SourceFinalCopy, migrate.SourceCommitted},
	},
	{
		name: "kill-destination-agent-and-libvirtd", do: killer("host2", lab.Agent, lab.Libvirtd), undo: starter("host2", lab.Agent, lab.Libvirtd),
		at: []migrate.State{migrate.DestReady},
	},
	{
		name: "kill-source-QEMU", do: func(c *cell) { c.killQEMU("host1") },
		at: []migrate.State{migrate.SourceCopying, migrate.SourceReadyWait},
	},
	{
		name: "kill-destination-QEMU", do: func(c *cell) { c.killQEMU("host2") },
		at:    []migrate.State{migrate.DestReceiving, migrate.DestReady},
		relay: []migrate.State{migrate.DestReceiving},
	},
	{
		name: "cut-link", do: (*cell).cut, undo: (*cell).heal,
		at:    []migrate.State{migrate.SourceFinalCopy},
		relay: []migrate.State{migrate.SourceCopying},
	},
	{
		name: "cancel", do: (*cell).cancel,
		at:    []migrate.State{migrate.SourceCopying, migrate.SourceReadyWait},
		relay: []migrate.State{migrate.SourceCopying, migrate.SourceReadyWait},
	},
	{
		name: "kill-source-virtlogd", do: killer("host1", lab.Virtlogd), undo: starter("host1", lab.Virtlogd),
		at: []migrate.State{migrate.SourceCopying},
	},
	{
		name: "kill-destination-virtlogd", do: killer("host2", lab.Virtlogd), undo: starter("host2", lab.Virtlogd),
		at: []migrate.State{migrate.DestReceiving},
	},
	{
		name: "fill-destination-memory", do: (*cell).fillMemory, undo: (*cell).freeMemory,
		at: []migrate.State{migrate.DestReceiving},
	},
	{name: "virsh-migrate", do: (*cell).virshMigrate, at: []migrate.State{migrate.SourceCopying}},
	{name: "virsh-destroy", do: (*cell).virshDestroy, at: []migrate.State{migrate.SourceCopying}},
	{name: "virsh-suspend", do: (*cell).virshSuspend, at: []migrate.State{migrate.SourceCopying}},
}

// TestFaults holds a migration at states of either side, does each of the faults
// to it, restarts and heals, and checks that the guest runs once, unharmed, or
// is gone where it was killed, and that nothing else is left.
func TestFaults(t *testing.T) {
	c := newCluster(t)
	var guest *lab.Guest
	defer func() {
		if guest != nil {
			c.remove(*guest)
		}
	}()
	for _, p := range points() {
		for _, f := range faults {
			for mode, at := range map[migrate.Mode][]migrate.State{migrate.Direct: f.at, migrate.Relay: f.relay} {
				if !all && !slices.Contains(at, p.state) || mode == migrate.Relay && !relayed(p.state) {
					continue
				}
				t.Run(p.String()+"/"+f.name+"/"+string(mode), func(t *testing.T) {
					m := &cell{cluster: c.in(t), point: p, mode: mode}
					m.ready(guest)
					guest = nil // unless it comes out of this well
					if m.run(f) {
						guest = &m.guest
					}
				})
			}
		}
	}
}

// relayed says whether migrations in relay mode have a state.
func relayed(s migrate.State) bool { return s != migrate.DestLoading }

// cell is one of the matrix.
type cell struct {
	*cluster
	point point
	mode  migrate.Mode
	guest lab.Guest
	id    string

	killed    map[string]bool // hosts whose copy was ended
	ranAtKill bool            // the destination's copy, and its CPUs may have run
	suspended bool            // another hand wanted it to stand still
}

// ready has a guest run on host1: the one of the cell before, moved back if need
// be, or a new one.
func (m *cell) ready(g *lab.Guest) {
	m.killed = make(map[string]bool)
	if g == nil {
		m.guest = m.start(flatSpec("cell-"+strings.ToLower(rand.Text()[:8]), domain.Shape{}))
		return
	}
	m.guest = *g
	info, err := m.cluster.guest("host2", g.Name)
	if err != nil {
		m.t.Fatal(err)
	}
	if info != nil {
		m.move(*g, "host2", "host1")
	}
}

// run does the fault and reports whether the guest runs on, having failed the
// test if it should and does not.
func (m *cell) run(f fault) (lives bool) {
	file := m.point.file()
	defer func() {
		_ = os.Remove(file) // left by a cell that failed
		_ = os.Remove(file + ".reached")
		if !lives {
			m.giveUp()
		}
	}()
	w := m.watch()
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		m.t.Fatal(err)
	}
	var err error
	if m.id, err = m.begin(m.guest.Name, "host1", "host2", &lmctlv1.MigrationOptions{Mode: string(m.mode)}); err != nil {
		m.t.Fatal(err)
	}
	m.eventually("the migration reaches "+m.point.String(), func() error {
		_, err := os.Stat(file + ".reached")
		return err
	})
	f.do(m)
	if err := errors.Join(os.Remove(file), os.Remove(file+".reached")); err != nil {
		m.t.Fatal(err)
	}
	if f.undo != nil {
		f.undo(m)
	}
	host := m.settled()
	if host != "" {
		m.healthy(m.guest, host)
	}
	w.neverTwice()
	m.nothingLeft(m.guest, host)
	return host != "" && !m.t.Failed()
}

// giveUp ends a guest whose migration may still be under way, and daemons that
// may still be dead.
func (m *cell) giveUp() {
	ctx := m.context()
	if _, err := m.lab.StartDead(ctx); err != nil {
		m.t.Error(err)
	}
	_, _ = m.clients["host1"].Migrations.Cancel(ctx, &lmctlv1.MigrationRequest{Id: m.id}) // it may have ended
	for _, h := range m.lab.Hosts() {
		for ctx.Err() == nil {
			g, err := m.cluster.guest(h, m.guest.Name)
			if err == nil && (g == nil || g.Migration == "" && g.Busy == "") {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	m.remove(m.guest)
}

// settled waits until both agents agree on where the guest is, and returns the
// host that runs it, or none if it has ended.
func (m *cell) settled() (host string) {
	m.t.Helper()
	m.eventually("both hosts settle", func() (err error) {
		var running, ended []string
		for _, h := range m.lab.Hosts() {
			g, err := m.cluster.guest(h, m.guest.Name)
			switch {
			case err != nil:
				return err
			case g == nil:
			case g.Busy != "" || g.Migration != "":
				return fmt.Errorf("it is busy on %s: %s %s", h, g.Busy, g.Migration)
			case g.Ownership.GetState() != "owned":
				return fmt.Errorf("on %s it is %s, %s: %s", h, g.State, g.Ownership.GetState(), g.Advice)
			case g.State == "running" && m.killed[h]:
				return fmt.Errorf("%s has not noticed yet that its copy was ended", h)
			case g.State == "paused" && m.suspended:
				if _, err := m.lab.Output(m.context(), h, "virsh", "resume", m.guest.Name); err != nil {
					return err
				}
				return errors.New("it stood still, as it was told")
			case g.State == "running":
				running = append(running, h)
			case g.State == "stopped":
				ended = append(ended, h)
			default:
				return fmt.Errorf("the guest is %s on %s: %s", g.State, h, g.Advice)
			}
		}
		switch {
		case len(running) == 1 && len(ended) == 0:
			host = running[0]
			return nil
		case len(running) == 0 && len(ended) == 1 && m.mayHaveEnded(ended[0]):
			host = ""
			return nil
		}
		return fmt.Errorf("running on %q, ended on %q", running, ended)
	})
	return host
}

// mayHaveEnded says whether the guest may be dead on a host: only where its one
// running copy was ended.
func (m *cell) mayHaveEnded(host string) bool {
	return m.killed[host] && (host == "host1" || m.ranAtKill)
}

func killer(host string, daemons ...lab.Daemon) func(*cell) {
	return func(m *cell) {
		for _, d := range daemons {
			if err := m.lab.KillDaemon(m.context(), host, d); err != nil {
				m.t.Fatal(err)
			}
		}
	}
}

func starter(host string, daemons ...lab.Daemon) func(*cell) {
	return func(m *cell) {
		for _, d := range daemons {
			m.startDaemon(host, d)
		}
	}
}

// killQEMU kills a host's copy of the guest, if there is one.
func (m *cell) killQEMU(host string) {
	pid, err := m.pid(m.guest, host)
	if errors.Is(err, os.ErrNotExist) {
		m.t.Logf("no copy on %s at this state", host)
		return
	}
	if err != nil {
		m.t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	defer unix.Close(fd)
	if !slices.Contains(m.processes(m.guest), pid) {
		m.t.Fatalf("process %d is not the guest's", pid)
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		m.t.Fatal(err)
	}
	m.eventually("QEMU ends", func() error {
		if slices.Contains(m.processes(m.guest), pid) {
			return fmt.Errorf("process %d is there", pid)
		}
		return nil
	})
	m.hasEnded(host)
}

func (m *cell) hasEnded(host string) {
	m.killed[host] = true
	// Where the word is out, the CPUs may have run when the end came.
	m.ranAtKill = host == "host2" && slices.Contains([]migrate.State{
		migrate.DestRunning, migrate.DestOwned, migrate.SourceHandedOver, migrate.SourceReleasing,
	}, m.point.state)
}

// cut parts the hosts for longer than they wait for one another.
func (m *cell) cut() {
	if err := m.lab.Cut("host2"); err != nil {
		m.t.Fatal(err)
	}
}

// heal waits until the source has noticed before it heals.
func (m *cell) heal() {
	report, err := m.wait("host1", m.id)
	if err := errors.Join(err, m.lab.Heal("host2")); err != nil {
		m.t.Fatal(err)
	}
	m.t.Logf("cut off: %s", report.Result)
}

func (m *cell) cancel() {
	if _, err := m.clients["host1"].Migrations.Cancel(m.t.Context(), &lmctlv1.MigrationRequest{Id: m.id}); err != nil {
		m.t.Fatal(err)
	}
}

// resizeMemory gives a host's memory another size, in bytes.
func (m *cell) resizeMemory(host string, size int64) {
	m.t.Helper()
	err := unix.Mount("", m.lab.MemoryDir(host), "", unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("size=%d", size))
	if err != nil {
		m.t.Fatal(err)
	}
}

// fillMemory leaves next to no room for guest memory on the destination.
func (m *cell) fillMemory() {
	var st unix.Statfs_t
	if err := unix.Statfs(m.lab.MemoryDir("host2"), &st); err != nil {
		m.t.Fatal(err)
	}
	m.resizeMemory("host2", int64(st.Blocks-st.Bfree)*st.Bsize+1<<20)
}

// freeMemory gives the room back once the source has noticed.
func (m *cell) freeMemory() {
	report, err := m.wait("host1", m.id)
	m.resizeMemory("host2", memoryLimit)
	if err != nil {
		m.t.Fatal(err)
	}
	if want := m.withoutRoom(); report.Result != want {
		m.t.Errorf("without room at the destination: %s %s, want it %s", report.Result, report.Error, want)
	}
}

// withoutRoom is how a migration ends that finds no room at the destination from
// this state on.
func (m *cell) withoutRoom() migrate.Result {
	switch m.point.String() {
	case "source-preparing", "destination-preparing":
		return migrate.Refused
	case "source-tracking", "source-copying", "destination-receiving":
		return migrate.Failed
	}
	return migrate.Completed // it has all of its memory already
}

// virshMigrate moves the guest to the same host by another hand, which is refused
// once libvirt has begun our own migration.
func (m *cell) virshMigrate() {
	_, err := m.lab.Output(m.context(), "host1", "virsh", "migrate", "--live", "--unsafe", "--persistent", "--undefinesource",
		m.guest.Name, "qemu+tcp://host2/system")
	early := m.point.state == migrate.SourcePreparing || m.point.state == migrate.DestPreparing
	if (err == nil) != early {
		m.t.Errorf("libvirt moves it: %v", err)
	}
}

// virshDestroy ends the source's copy by another hand.
func (m *cell) virshDestroy() {
	if _, err := m.lab.Output(m.context(), "host1", "virsh", "destroy", m.guest.Name); err != nil {
		m.t.Logf("libvirt refuses: %v", err)
		return
	}
	m.hasEnded("host1")
}

// virshSuspend has the source's copy stand still by another hand.
func (m *cell) virshSuspend() {
	if _, err := m.lab.Output(m.context(), "host1", "virsh", "suspend", m.guest.Name); err != nil {
		m.t.Logf("libvirt refuses: %v", err)
		return
	}
	m.suspended = true
}
