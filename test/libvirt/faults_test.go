package libvirt

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/migrate"
)

// fault is something that goes wrong while a migration stands at a state.
type fault struct {
	name string
	do   func(*cell)
	undo func(*cell) // restarts what died and heals what was cut
	// at is where everybody's tests do it, in direct mode, and relay where they do
	// it in relay mode.
	at, relay []migrate.State
}

// usual is where everybody's tests do it.
func (f fault) usual(mode migrate.Mode) []migrate.State {
	if mode == migrate.Relay {
		return f.relay
	}
	return f.at
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
		name: "kill-source-QEMU", do: func(m *cell) { m.killCopy("host1") },
		at: []migrate.State{migrate.SourceCopying, migrate.SourceReadyWait},
	},
	{
		name: "kill-destination-QEMU", do: func(m *cell) { m.killCopy("host2") },
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
	{
		name: "fill-destination-disk", do: (*cell).fillDisk, undo: (*cell).freeDisk,
		at: []migrate.State{migrate.DestPreparing, migrate.DestReady},
	},
	// As an upgrade does: the agent is asked to end, and another takes its place.
	{
		name: "upgrade-source-agent", do: func(m *cell) { m.stopAgent("host1") }, undo: func(m *cell) { m.replaceAgent("host1") },
		at: []migrate.State{migrate.SourceCopying},
	},
	{
		name: "upgrade-destination-agent", do: func(m *cell) { m.stopAgent("host2") }, undo: func(m *cell) { m.replaceAgent("host2") },
		at: []migrate.State{migrate.DestReceiving},
	},
	{name: "virsh-migrate", do: (*cell).virshMigrate, at: []migrate.State{migrate.SourceCopying}},
	{name: "virsh-destroy", do: (*cell).virshDestroy, at: []migrate.State{migrate.SourceCopying}},
	{name: "virsh-suspend", do: (*cell).virshSuspend, at: []migrate.State{migrate.SourceCopying}},
}

func killer(host string, daemons ...lab.Daemon) func(*cell) {
	return func(m *cell) {
		for _, d := range daemons {
			if err := m.Lab.KillDaemon(m.Context(), host, d); err != nil {
				m.T.Fatal(err)
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

// killCopy kills a host's copy of the guest, if there is one.
func (m *cell) killCopy(host string) {
	if m.killQEMU(m.guest, host) {
		m.hasEnded(host)
	} else {
		m.T.Logf("no copy on %s at this state", host)
	}
}

// killQEMU kills a guest's QEMU on a host and waits for its end, if there is one.
func (c *cluster) killQEMU(g lab.Guest, host string) bool {
	c.T.Helper()
	pid, err := c.pid(g, host)
	if errors.Is(err, os.ErrNotExist) {
		return false
	}
	if err != nil {
		c.T.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		c.T.Fatal(err)
	}
	defer unix.Close(fd)
	if !slices.Contains(c.processes(g), pid) {
		c.T.Fatalf("process %d is not the guest's", pid)
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		c.T.Fatal(err)
	}
	c.Eventually("QEMU ends", func() error {
		if slices.Contains(c.processes(g), pid) {
			return fmt.Errorf("process %d is there", pid)
		}
		return nil
	})
	return true
}

func (m *cell) hasEnded(host string) {
	m.killed[host] = true
	// Where the word is out, the CPUs may have run when the end came.
	m.ranAtKill = host == "host2" && slices.Contains([]migrate.State{
		migrate.DestRunning, migrate.DestOwned, migrate.SourceHandedOver, migrate.SourceReleasing,
	}, m.point.State)
}

// stopAgent asks an agent to end, which takes on nothing new from then on.
func (m *cell) stopAgent(host string) {
	if err := m.Lab.SignalAgent(m.Context(), host, unix.SIGTERM, false); err != nil {
		m.T.Fatal(err)
	}
	address, err := lab.HostAddress(host)
	if err != nil {
		m.T.Fatal(err)
	}
	m.Eventually("the agent's port is closed", func() error {
		conn, err := m.Lab.Dial(m.Context(), host, "tcp", netip.AddrPortFrom(address, lab.AgentPort).String())
		if errors.Is(err, unix.ECONNREFUSED) {
			return nil
		}
		if err == nil {
			err = errors.Join(errors.New("it answers"), conn.Close())
		}
		return err
	})
}

// replaceAgent starts an agent in the place of one that was asked to end, when it
// has.
func (m *cell) replaceAgent(host string) {
	m.Eventually("the agent ends", func() error {
		runs, err := m.Lab.AgentRuns(host)
		if runs {
			err = errors.New("it is there")
		}
		return err
	})
	m.startDaemon(host, lab.Agent)
}

// cut parts the hosts for longer than they wait for one another.
func (m *cell) cut() {
	if err := m.Lab.Cut("host2"); err != nil {
		m.T.Fatal(err)
	}
}

// heal waits until the source has noticed before it heals.
func (m *cell) heal() {
	report, err := m.Wait("host1", m.id)
	if err := errors.Join(err, m.Lab.Heal("host2")); err != nil {
		m.T.Fatal(err)
	}
	m.T.Logf("cut off: %s", report.Result)
}

func (m *cell) cancel() {
	if _, err := m.Clients["host1"].Migrations.Cancel(m.T.Context(), &lmctlv1.MigrationRequest{Id: m.id}); err != nil {
		m.T.Fatal(err)
	}
}

// resize gives a host's file system another size, in bytes.
func (m *cell) resize(dir string, size int64) {
	m.T.Helper()
	err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("size=%d", size))
	if err != nil {
		m.T.Fatal(err)
	}
}

// fill leaves no more room in a host's file system than this.
func (m *cell) fill(dir string, room int64) {
	m.T.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		m.T.Fatal(err)
	}
	m.resize(dir, int64(st.Blocks-st.Bfree)*st.Bsize+room)
}

// free gives the destination its room back once the source has noticed that there
// was none, and sees that the migration has ended in one of these ways.
func (m *cell) free(dir string, size int64, want []migrate.Result) {
	m.T.Helper()
	report, err := m.Wait("host1", m.id)
	m.resize(dir, size)
	if err != nil {
		m.T.Fatal(err)
	}
	if !slices.Contains(want, report.Result) {
		m.T.Errorf("without room at the destination: %s %s, want it %s", report.Result, report.Error, want)
	}
}

func (m *cell) fillMemory() { m.fill(m.Lab.MemoryDir("host2"), 1<<20) }
func (m *cell) freeMemory() { m.free(m.Lab.MemoryDir("host2"), memoryLimit, m.withoutMemory()) }

func (m *cell) fillDisk() {
	m.fill(m.Lab.DiskDir("host2"), 0)
	m.diskFull = true
}

func (m *cell) freeDisk() { m.free(m.Lab.DiskDir("host2"), diskLimit, m.withoutDisk()) }

// withoutDisk is how a migration may end that finds the destination's disk full
// from this state on: the agent has what it must write down laid out before
// anything is copied, and libvirt's definition can wait.
func (m *cell) withoutDisk() []migrate.Result {
	switch m.point.String() {
	case "source.preparing", "destination.preparing":
		return []migrate.Result{migrate.Refused}
	}
	return []migrate.Result{migrate.Completed}
}

// withoutMemory is how a migration may end that finds no memory at the destination
// from this state on.
func (m *cell) withoutMemory() []migrate.Result {
	switch m.point.String() {
	case "source.preparing", "destination.preparing":
		return []migrate.Result{migrate.Refused}
	case "source.tracking", "source.copying", "destination.receiving":
		return []migrate.Result{migrate.Failed}
	case "source.suspending", "source.final-copy", "destination.final":
		if m.mode == migrate.Relay {
			// QEMU may still be sending pages, and those be new ones or not.
			return []migrate.Result{migrate.Failed, migrate.Completed}
		}
	}
	return []migrate.Result{migrate.Completed} // it has all of its memory already
}

// virshMigrate moves the guest to the same host by another hand, which is refused
// once libvirt has begun our own migration.
func (m *cell) virshMigrate() {
	_, err := m.Lab.Output(m.Context(), "host1", "virsh", "migrate", "--live", "--unsafe", "--persistent", "--undefinesource",
		m.guest.Name, "qemu+tcp://host2/system")
	early := m.point.State == migrate.SourcePreparing || m.point.State == migrate.DestPreparing
	if (err == nil) != early {
		m.T.Errorf("libvirt moves it: %v", err)
	}
}

// virshDestroy ends the source's copy by another hand.
func (m *cell) virshDestroy() {
	if _, err := m.Lab.Output(m.Context(), "host1", "virsh", "destroy", m.guest.Name); err != nil {
		m.T.Logf("libvirt refuses: %v", err)
		return
	}
	m.hasEnded("host1")
}

// virshSuspend has the source's copy stand still by another hand.
func (m *cell) virshSuspend() {
	if _, err := m.Lab.Output(m.Context(), "host1", "virsh", "suspend", m.guest.Name); err != nil {
		m.T.Logf("libvirt refuses: %v", err)
		return
	}
	m.suspended = true
}
