package e2e

import (
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/migrate"
	"github.com/lmctl/lmctl/test/labtest"
)

// fault is something that goes wrong while a migration stands at a state.
type fault struct {
	name string
	do   func(*matrixCase)
	// undo restarts what died and heals what was cut.
	undo func(*matrixCase)
}

var faults = []fault{
	{"kill source agent", func(m *matrixCase) { m.killAgent("host1") }, func(m *matrixCase) { m.startAgent("host1") }},
	{"kill destination agent", func(m *matrixCase) { m.killAgent("host2") }, func(m *matrixCase) { m.startAgent("host2") }},
	{"kill source QEMU", func(m *matrixCase) { m.killQEMU("host1") }, nil},
	{"kill shell QEMU", func(m *matrixCase) { m.killQEMU("host2") }, nil},
	{"cut link", (*matrixCase).cutLink, (*matrixCase).healLink},
	{"cancel", (*matrixCase).cancel, nil},
	{"destination out of memory", (*matrixCase).fillMemory, (*matrixCase).freeMemory},
}

// TestCrashMatrix holds a migration at each state of either side, does each of
// the faults to it, restarts and heals, and checks that the guest runs once,
// unharmed, and that nothing else is left. Each side has a lab of its own: most of
// the time a lab waits for something.
func TestCrashMatrix(t *testing.T) {
	var running sync.WaitGroup
	for _, role := range []string{"source", "destination"} {
		running.Go(func() {
			t.Run(role, func(t *testing.T) { crashMatrix(newCluster(t, smallMemory), role) })
		})
	}
	running.Wait()
}

// crashMatrix is the part of the matrix in which migrations are held on one side.
func crashMatrix(c *cluster, role string) {
	var guest *flatGuest
	for _, p := range labtest.Points() {
		if p.Role != role {
			continue
		}
		for _, f := range faults {
			c.T.Run(string(p.State)+"/"+strings.ReplaceAll(f.name, " ", "-"), func(t *testing.T) {
				m := &matrixCase{cluster: c.in(t), point: p}
				m.guest = m.ready(guest)
				guest = nil // unless it comes out of this well
				if m.run(f) {
					guest = m.guest
				}
			})
		}
	}
}

// matrixCase is one cell of the matrix.
type matrixCase struct {
	*cluster
	point labtest.Point
	guest *flatGuest
	id    string

	killedSource, killedShell bool // a QEMU was killed
	ranAtKill                 bool // and its vCPUs may have run at the destination
}

// ready returns a guest that runs on host1: the one of the case before, moved
// back if need be, or a new one.
func (m *matrixCase) ready(g *flatGuest) *flatGuest {
	if g == nil {
		name := "cell-" + strings.ToLower(rand.Text()[:8])
		return m.startFlat(name, "host1", flat.Config{Memory: 32 << 20, Pages: 4000, Rate: 20000}, "")
	}
	again := *g
	again.c = m.cluster
	if info, err := m.Guest("host2", g.name); err != nil {
		m.T.Fatal(err)
	} else if info != nil {
		m.move(g.name, "host2", "host1")
	}
	return &again
}

// run does the fault and reports whether the guest runs on, having failed the
// test if it should and does not.
func (m *matrixCase) run(f fault) (lives bool) {
	w := m.watchRunning(m.guest)
	stop := m.Hold(m.point)
	defer func() {
		m.Release(stop) // also when the case has failed
		if !lives {
			m.GiveUp(m.guest.name, m.id)
			m.destroy(m.guest)
		}
	}()
	m.id = m.start(m.guest.name, "host1", "host2", &lmctlv1.MigrationOptions{})
	m.Reached(stop)
	f.do(m)
	m.Release(stop)
	if f.undo != nil {
		f.undo(m)
	}
	host := m.settled()
	w.never2()
	if host != "" {
		m.guest.goesOn(host)
		w.never2()
	}
	m.nothingLeft(m.guest, host)
	return host != "" && !m.T.Failed()
}

// settled waits until both agents agree on where the guest is, and returns the
// host that runs it, or none if it has ended.
func (m *matrixCase) settled() (host string) {
	m.T.Helper()
	host, _ = m.Settled(m.guest.name, func(h string, g *lmctlv1.Guest) error {
		switch {
		case g.State == "running" && (h == "host1" && m.killedSource || h == "host2" && m.killedShell):
			return fmt.Errorf("%s has not noticed yet that its copy was killed", h)
		case g.State == "stopped" && g.End.GetCause() == "":
			return fmt.Errorf("it is stopped on %s, and nobody says why", h)
		}
		return nil
	}, m.mayHaveEnded)
	return host
}

// mayHaveEnded says whether the guest may be dead on a host: only where its one
// running copy was killed.
func (m *matrixCase) mayHaveEnded(host string) bool {
	return host == "host1" && m.killedSource || host == "host2" && m.killedShell && m.ranAtKill
}

func (m *matrixCase) killAgent(host string) {
	if err := m.Lab.KillAgent(m.T.Context(), host); err != nil {
		m.T.Fatal(err)
	}
}

func (m *matrixCase) startAgent(host string) {
	if err := m.Lab.StartAgent(m.T.Context(), host); err != nil {
		m.T.Fatal(err)
	}
}

// killQEMU kills a host's copy of the guest, and skips where there is none yet
// or no more.
func (m *matrixCase) killQEMU(host string) {
	pids := qemusOf(m.T, m.guest.uuid, m.Lab.HostDir(host))
	if len(pids) == 0 {
		m.T.Logf("no copy on %s at this state", host)
		return
	}
	fd, err := unix.PidfdOpen(pids[0], 0)
	if err != nil {
		m.T.Fatal(err)
	}
	defer unix.Close(fd)
	if !slices.Equal(pids, qemusOf(m.T, m.guest.uuid, m.Lab.HostDir(host))) {
		m.T.Fatalf("processes %v changed", pids)
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		m.T.Fatal(err)
	}
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(poll, int(labtest.Patience/time.Millisecond))
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if host == "host1" {
		m.killedSource = true
		return
	}
	m.killedShell = true
	// Where the word is out, the vCPUs may have run when the kill came.
	m.ranAtKill = m.point.Role == "destination" && slices.Contains([]migrate.State{migrate.DestRunning, migrate.DestOwned}, m.point.State) ||
		m.point.Role == "source" && slices.Contains([]migrate.State{migrate.SourceHandedOver, migrate.SourceReleasing}, m.point.State)
}

// cutLink parts the hosts for longer than they wait for one another.
func (m *matrixCase) cutLink() {
	if err := m.Lab.Cut("host2"); err != nil {
		m.T.Fatal(err)
	}
}

// healLink waits until the source has noticed before it heals, so that a cut
// is never shorter than the peers' labtest.Patience.
func (m *matrixCase) healLink() {
	report := m.wait("host1", m.id)
	m.T.Logf("cut off: %s", report.Result)
	if err := m.Lab.Heal("host2"); err != nil {
		m.T.Fatal(err)
	}
}

func (m *matrixCase) cancel() {
	_, err := m.Clients["host1"].Migrations.Cancel(m.T.Context(), &lmctlv1.MigrationRequest{Id: m.id})
	if err != nil {
		m.T.Fatal(err)
	}
}

// fillMemory leaves the destination no memory for the guest.
func (m *matrixCase) fillMemory() { m.fill("host2") }

func (m *matrixCase) freeMemory() {
	// What the failure, if there is one, leads to comes first.
	report := m.wait("host1", m.id)
	m.T.Logf("out of memory: %s %s", report.Result, report.Error)
	m.empty("host2")
}

// smallMemory leaves a host little room for guests.
func smallMemory(o *lab.Options) { o.MemoryLimit = 96 << 20 }
