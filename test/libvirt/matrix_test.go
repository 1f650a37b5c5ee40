package libvirt

import (
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/lab/domain"
	"github.com/lmctl/lmctl/migrate"
	"github.com/lmctl/lmctl/test/labtest"
)

// lane is the part of the matrix in which migrations of one mode are held on one
// side.
type lane struct {
	mode migrate.Mode
	role string
}

func (l lane) String() string { return string(l.mode) + "/" + l.role }

// TestFaults holds a migration at states of either side, does each of the faults
// to it, restarts and heals, and checks that the guest runs once, unharmed, or
// is gone where it was killed, and that nothing else is left. Most of a cell's
// time libvirt or a timeout is waited for, so that labs side by side take little
// more than one.
func TestFaults(t *testing.T) {
	lanes := []lane{{migrate.Direct, "source"}, {migrate.Direct, "destination"}, {migrate.Relay, "source"}, {migrate.Relay, "destination"}}
	shares := [][]lane{lanes[:1], lanes[1:]} // of about the same size
	if all {
		shares = slices.Collect(slices.Chunk(lanes, 1))
	}
	var running sync.WaitGroup
	for i, share := range shares {
		c := newCluster(t)
		if i > 0 {
			c = ownCluster(t, fmt.Sprintf("faults%d", i), lab.Options{Hosts: 2, MemoryLimit: 1 << 30})
		}
		running.Go(func() {
			for _, l := range share {
				t.Run(l.String(), func(t *testing.T) { l.run(c.in(t)) })
			}
		})
	}
	running.Wait()
}

func (l lane) run(c *cluster) {
	var guest *lab.Guest
	defer func() {
		if guest != nil {
			c.remove(*guest)
		}
	}()
	for _, p := range labtest.Points() {
		for _, f := range faults {
			if p.Role != l.role || l.mode == migrate.Relay && !relayed(p.State) || !all && !slices.Contains(f.usual(l.mode), p.State) {
				continue
			}
			c.T.Run(string(p.State)+"/"+f.name, func(t *testing.T) {
				m := &cell{cluster: c.showing(t), point: p, mode: l.mode}
				m.ready(guest)
				guest = nil // unless it comes out of this well
				if m.run(f) {
					guest = &m.guest
				}
			})
		}
	}
}

// relayed says whether migrations in relay mode have a state.
func relayed(s migrate.State) bool { return s != migrate.DestLoading }

// cell is one of the matrix.
type cell struct {
	*cluster
	point labtest.Point
	mode  migrate.Mode
	guest lab.Guest
	id    string

	before    map[string]traces // of the guest, by host, when nothing was done yet
	told      settings          // by its QEMU, then
	killed    map[string]bool   // hosts whose copy was ended
	ranAtKill bool              // the destination's copy, and its CPUs may have run
	endedOn   string            // the host it ended on
	suspended bool              // another hand wanted it to stand still
	diskFull  bool              // the destination's was, for a time
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
	info, err := m.Guest("host2", g.Name)
	if err != nil {
		m.T.Fatal(err)
	}
	if info != nil {
		m.move(*g, "host2", "host1")
	}
}

// run does the fault and reports whether the guest runs on, having failed the
// test if it should and does not.
func (m *cell) run(f fault) (lives bool) {
	m.look()
	w := m.watch()
	stop := m.Hold(m.point)
	defer func() {
		m.Release(stop) // also when the cell has failed
		if !lives {
			m.giveUp()
		}
	}()
	var err error
	if m.id, err = m.Begin(m.guest.Name, "host1", "host2", &lmctlv1.MigrationOptions{Mode: string(m.mode)}); err != nil {
		m.T.Fatal(err)
	}
	m.Reached(stop)
	f.do(m)
	m.Release(stop)
	if f.undo != nil {
		f.undo(m)
	}
	host := m.settled()
	if host != "" {
		m.healthy(m.guest, host)
	}
	w.neverTwice()
	m.nothingLeft(m.guest, host)
	m.asBefore(host)
	return host != "" && !m.T.Failed()
}

// look notes what there is of the guest.
func (m *cell) look() {
	m.before = make(map[string]traces)
	for _, h := range m.Lab.Hosts() {
		m.before[h] = m.traces(m.guest, h)
	}
	m.told = m.settings(m.guest, "host1")
}

// asBefore checks that each host has of the guest what host1 and host2 had of it
// before, whichever has it now. None does if it has ended: of that its definition
// is left, where it was last.
func (m *cell) asBefore(host string) {
	m.T.Helper()
	for _, h := range m.Lab.Hosts() {
		want := m.before["host2"]
		switch {
		case h == host:
			want = m.before["host1"]
		case host == "" && m.endedOn == h:
			want = m.before["host1"].atRest()
		}
		m.Eventually("virsh list and files on "+h+" are as before", func() error {
			if got := m.traces(m.guest, h); !slices.Equal(got, want) {
				return fmt.Errorf("there is %q, and was %q", got, want)
			}
			return nil
		})
	}
	if host != "" {
		m.sameSettings(m.guest, host, m.told)
	}
}

// giveUp ends a guest whose migration may still be under way, and daemons that
// may still be dead.
func (m *cell) giveUp() {
	if _, err := m.Lab.StartDead(m.Context()); err != nil {
		m.T.Error(err)
	}
	m.GiveUp(m.guest.Name, m.id)
	m.remove(m.guest)
}

// settled waits until both agents agree on where the guest is, and returns the
// host that runs it, or none if it has ended.
func (m *cell) settled() (host string) {
	m.T.Helper()
	host, m.endedOn = m.Settled(m.guest.Name, func(h string, g *lmctlv1.Guest) error {
		switch {
		case g.Ownership.GetState() != "owned":
			return fmt.Errorf("on %s it is %s, %s: %s", h, g.State, g.Ownership.GetState(), g.Advice)
		case g.State == "running" && m.killed[h]:
			return fmt.Errorf("%s has not noticed yet that its copy was ended", h)
		case g.State == "paused" && m.suspended:
			if _, err := m.Lab.Output(m.Context(), h, "virsh", "resume", m.guest.Name); err != nil {
				return err
			}
			return errors.New("it stood still, as it was told")
		case g.State == "unreachable" && m.diskFull && strings.Contains(g.Runstate, "restart libvirtd"):
			// The disk was full just when libvirt wrote the definition.
			m.restartLibvirtd(h)
			return errors.New("libvirt had forgotten it")
		}
		return nil
	}, m.mayHaveEnded)
	return host
}

// mayHaveEnded says whether the guest may be dead on a host: only where its one
// running copy was ended.
func (m *cell) mayHaveEnded(host string) bool {
	return m.killed[host] && (host == "host1" || m.ranAtKill)
}
