package libvirt

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/lab/domain"
	"github.com/lmctl/lmctl/migrate"
)

// representative are the shapes that everybody's tests move: each machine, each
// kind of memory, everything that a guest can have, the other firmware, and some
// of each bus, format and kind of I/O.
var representative = []string{
	"pc-virtio-qcow2-writeback-threads", "pc-scsi-raw-uring", "q35-sata-raw-threads", "pc-two-nodes",
	"q35-everything", "pc-memfd", "q35-private", "linux-q35-uefi",
}

// row is a line of the table of what was moved.
type row struct{ shape, way, result string }

// table collects rows of tests that run in parallel.
type table struct {
	mu   sync.Mutex
	rows []row
}

func (t *table) add(shape, way, result string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rows = append(t.rows, row{shape, way, result})
}

func (t *table) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	slices.SortStableFunc(t.rows, func(a, b row) int { return cmp.Compare(a.shape, b.shape) })
	var s strings.Builder
	w := tabwriter.NewWriter(&s, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "shape\tway\tresult")
	for _, r := range t.rows {
		fmt.Fprintf(w, "%s\t%s\t%s\n", r.shape, r.way, r.result)
	}
	if err := w.Flush(); err != nil {
		return err.Error()
	}
	return s.String()
}

func words(r *migrate.Report) string {
	return fmt.Sprintf("%s: %d passes, %.1f ms downtime, %d pages verified", r.Mode, len(r.Passes), float64(r.Downtime)/1e6, r.VerifiedPages)
}

// Domains of every shape move there and back, and are ordinary ones at once.
// Those that direct mode is not for are relayed, or refused and run on.
func TestShapes(t *testing.T) {
	c := newCluster(t)
	var moved table
	t.Run("guests", func(t *testing.T) { // ends when all of them have
		for i, shape := range domain.Cases() {
			if !all && !slices.Contains(representative, shape.Name) {
				continue
			}
			t.Run(shape.Name, func(t *testing.T) {
				t.Parallel()
				s := &shapeCase{cluster: c.showing(t), shape: shape, table: &moved}
				s.guest = s.start(specOf(shape, i))
				defer s.remove(s.guest)
				if s.why = s.notDirect(); s.why != "" {
					s.refused(&lmctlv1.MigrationOptions{Mode: string(migrate.Direct)})
					if s.shape.Linux { // emulated, which QEMU's own passes may corrupt
						s.refused(&lmctlv1.MigrationOptions{})
						return
					}
				}
				s.thereAndBack()
			})
		}
	})
	t.Logf("moved:\n%s", &moved)
}

// specOf is a guest of a shape.
func specOf(c domain.Case, number int) lab.GuestSpec {
	s := lab.GuestSpec{
		Name: fmt.Sprintf("shape%d", number), Kind: lab.Flat, Host: "host1", Memory: c.Memory, VCPUs: c.VCPUs,
		Shape: c.Shape, WorkingSet: 8 << 20, DirtyRate: 1 << 20,
	}
	if c.Linux {
		s.Kind = lab.Linux
	}
	return s
}

type shapeCase struct {
	*cluster
	shape domain.Case
	guest lab.Guest
	table *table
	why   string // part of the reason why it cannot be moved directly, or empty
}

// notDirect is a part of the reason why a guest cannot be moved directly, or
// empty.
func (s *shapeCase) notDirect() string {
	switch {
	case s.shape.Shape.Backing == domain.Private:
		return "private memory"
	case s.shape.Shape.Backing == domain.Memfd && s.shape.Shape.Nodes > 1:
		return "of this kind and size" // which of two nameless files is which
	}
	return ""
}

func (s *shapeCase) refused(options *lmctlv1.MigrationOptions) {
	r, err := s.tryWith(s.guest.Name, "host1", "host2", options)
	said := fmt.Sprint(err)
	if err == nil {
		said = fmt.Sprintf("%s: %s", r.Result, r.Error)
	}
	if err == nil && r.Result == migrate.Completed || !strings.Contains(said, s.why) {
		s.T.Errorf("its migration: %s; wanted a refusal with %q", said, s.why)
	}
	s.healthy(s.guest, "host1")
	s.nothingLeft(s.guest, "host1")
	s.table.add(s.shape.Name, "host1", said)
}

func (s *shapeCase) thereAndBack() {
	before := s.settings(s.guest, "host1")
	s.leg("host1", "host2", before)
	s.leg("host2", "host1", before)
}

// leg moves the guest, and sees that it is an ordinary one at once, with the
// settings of before.
func (s *shapeCase) leg(from, to string, before settings) {
	s.T.Helper()
	var r *migrate.Report
	if s.why == "" {
		r = s.move(s.guest, from, to)
	} else {
		r = s.relay(s.guest, from, to, &lmctlv1.MigrationOptions{})
	}
	s.table.add(s.shape.Name, from+" to "+to, words(r))
	if s.shape.Linux && r.Announced < 1 {
		s.T.Error("no address was announced")
	}
	s.healthy(s.guest, to)
	s.nothingLeft(s.guest, to)
	if known := strings.Fields(s.virsh(from, "list", "--all", "--name")); slices.Contains(known, s.guest.Name) {
		s.T.Errorf("%s still knows it", from)
	}
	s.sameSettings(s.guest, to, before)
	s.ordinary(to)
}

// ordinary sees that virsh can do with the guest what it can with any.
func (s *shapeCase) ordinary(host string) {
	want := "yes"
	if s.shape.Shape.Transient {
		want = "no"
	}
	if about := s.virsh(host, "dominfo", s.guest.Name); field(about, "Persistent") != want || field(about, "State") != "running" {
		s.T.Errorf("on %s, wanted persistent %s and running:\n%s", host, want, about)
	}
	if err := s.diskOwner(s.guest); err != nil {
		s.T.Error(err)
	}
	// A QEMU before 10 does not say.
	nodes := s.virsh(host, "qemu-monitor-command", s.guest.Name, `{"execute": "query-named-block-nodes", "arguments": {"flat": true}}`)
	if strings.Contains(nodes, `"active":false`) {
		s.T.Errorf("on %s it runs without its disks: %s", host, nodes)
	}
	s.virsh(host, "suspend", s.guest.Name)
	if state := s.virsh(host, "domstate", s.guest.Name, "--reason"); state != "paused (user)" {
		s.T.Errorf("suspended, it is %s", state)
	}
	s.virsh(host, "resume", s.guest.Name)
	s.known(s.guest, host)
	s.healthy(s.guest, host)
}

// field is a line's value in what virsh says.
func field(text, name string) string {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}
