package libvirt

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"sync"
	"time"

	lv "github.com/digitalocean/go-libvirt"

	"github.com/lmctl/lmctl/internal/hypervisor/queue"
)

// link is one connection with the events that come over it. A subscription lasts
// as long as the connection: to end one earlier can block go-libvirt for good,
// when an event is just on its way.
type link struct {
	*lv.Libvirt

	mu   sync.Mutex
	subs map[string]bool // by UUID: QEMU's events of that domain come
}

// happening is what QEMU or libvirt say of a migration of a domain under way.
type happening struct {
	what string    // a migration's status, suspended, or a pass
	pass int       // the one that begins
	at   time.Time // when it was so, or when we heard
}

// passEvent is QEMU's word that a pass of its own begins.
const passEvent = "pass"

// suspendedEvent is libvirt's word that a domain was stopped. It is not QEMU's
// STOP, since go-libvirt loses events without details.
const suspendedEvent = "suspended"

// follow has the domain's events come to its listener, if there is one.
func (k *link) follow(g *domain) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.subs[g.uuid] {
		return nil
	}
	events, err := k.SubscribeQEMUEvents(context.Background(), g.name)
	if err != nil {
		return fmt.Errorf("subscribe to QEMU's events: %w", err)
	}
	k.subs[g.uuid] = true
	g.d.wg.Go(func() {
		for e := range until(g.d.ctx, events) {
			if h := happeningOf(e); h.what != "" {
				g.d.hear(e.Domain.Name, h)
			}
		}
	})
	return nil
}

// until passes what comes on until ctx ends. A libvirtd that hangs must not hold
// up the driver's end; go-libvirt queues what nobody takes.
func until[T any](ctx context.Context, from <-chan T) iter.Seq[T] {
	return func(yield func(T) bool) {
		for {
			select {
			case e, ok := <-from:
				if !ok || !yield(e) {
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}
}

// happeningOf is what an event tells of a migration. One that tells nothing is
// the zero value.
func happeningOf(e lv.DomainEvent) happening {
	var details struct {
		Status string `json:"status"`
		Pass   int    `json:"pass"`
	}
	if json.Unmarshal(e.Details, &details) != nil {
		return happening{}
	}
	switch e.Event {
	case "MIGRATION":
		return happening{what: details.Status, at: sentAt(e)}
	case "MIGRATION_PASS":
		return happening{what: passEvent, pass: details.Pass, at: sentAt(e)}
	}
	return happening{}
}

// sentAt is when QEMU sent an event.
func sentAt(e lv.DomainEvent) time.Time {
	return time.Unix(int64(e.Seconds), int64(e.Microseconds)*int64(time.Microsecond))
}

// hear tells a domain's listener.
func (d *Driver) hear(name string, h happening) {
	g, err := d.lookup(name)
	if err != nil {
		return // it is gone
	}
	g.mu.Lock()
	q := g.listener
	g.mu.Unlock()
	if q != nil {
		q.Put(h)
	}
}

// listen has what happens go to a queue, or to nobody.
func (g *domain) listen(q *queue.Queue[happening]) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.listener = q
}
