package libvirt

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/lab/domain"
	"github.com/lmctl/lmctl/migrate"
)

// A guest that writes without limit is relayed in so many passes and no more,
// compressed or not, and is whole. What QEMU and libvirt were told for that is
// taken back, on a host that keeps the guest too.
func TestRelay(t *testing.T) {
	c := newCluster(t).showing(t)
	spec := flatSpec("relayed", domain.Shape{})
	spec.WorkingSet, spec.DirtyRate = 32<<20, lab.Unbounded
	g := c.start(spec)
	defer c.remove(g)
	before := c.settings(g, "host1")
	asBefore := func(host string) {
		t.Helper()
		c.healthy(g, host)
		c.nothingLeft(g, host)
		c.sameSettings(g, host, before)
	}
	options := &lmctlv1.MigrationOptions{Mode: string(migrate.Relay), MaxPasses: proto.Int32(2)}
	t.Log(words(c.relay(g, "host1", "host2", options)))
	asBefore("host2")
	options.Compress, options.Streams = true, proto.Int32(3)
	r := c.relay(g, "host2", "host1", options)
	t.Log(words(r))
	if r.BytesSent > g.Memory/2 { // a page of this guest differs from the next in a few bytes
		t.Errorf("compressed, %d bytes were sent of %d of memory", r.BytesSent, g.Memory)
	}
	asBefore("host1")

	slow := &lmctlv1.MigrationOptions{Mode: string(migrate.Relay), Bandwidth: proto.Int64(1 << 20)}
	id, err := c.Begin(g.Name, "host1", "host2", slow)
	if err != nil {
		t.Fatal(err)
	}
	c.Eventually("the migration copies", func() error { return c.inState("host1", id, migrate.SourceCopying) })
	if _, err := c.Clients["host1"].Migrations.Cancel(t.Context(), &lmctlv1.MigrationRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Wait("host1", id); err != nil || r.Result != migrate.Cancelled {
		t.Fatalf("cancelled: %+v, %v", r, err)
	}
	asBefore("host1")
}
