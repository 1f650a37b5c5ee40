package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
	"github.com/lmctl/lmctl/internal/lab"
)

// parameters are QEMU's for a migration; those not named keep QEMU's defaults.
type parameters map[string]int64

// prepare sets what a migration needs on one side of it. With shared, RAM in
// shared files stays out of QEMU's stream.
func prepare(ctx context.Context, o *qemu.Observer, shared bool, p parameters) error {
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	// What the destination of a migration was set to, it still is as the source
	// of the next.
	list := []capability{{"events", true}, {"x-ignore-shared", shared}}
	if err := o.Run(ctx, "migrate-set-capabilities", map[string]any{"capabilities": list}, nil); err != nil {
		return err
	}
	if len(p) == 0 {
		return nil
	}
	return o.Run(ctx, "migrate-set-parameters", p, nil)
}

// migrationPort is where a destination listens, in its host's namespace.
const migrationPort = 49152

// precopy is QEMU's own, as libvirt drives it: over TCP from host to host, the
// destination started with -S and told to go on when it has all.
func precopy(p parameters) travel {
	return func(ctx context.Context, u *unmanaged, destination *qemu.Observer) (Own, error) {
		if err := errors.Join(prepare(ctx, u.source, false, p), prepare(ctx, destination, false, nil)); err != nil {
			return Own{}, err
		}
		sent, err := u.migrate(ctx, destination)
		if err != nil {
			return Own{}, err
		}
		err = destination.Run(ctx, "cont", nil, nil)
		if err = errors.Join(err, sent()); err != nil {
			return Own{}, err
		}
		return precopyAccount(ctx, u.source)
	}
}

// migrate has the source send the guest and the destination load it, and returns
// when it stands there, stopped. The source may take a little longer, for which
// sent waits; it is to be called.
func (u *unmanaged) migrate(ctx context.Context, destination *qemu.Observer) (sent func() error, err error) {
	host, err := lab.HostAddress(u.b.hosts[otherHost(u.at)])
	if err != nil {
		return nil, err
	}
	uri := map[string]string{"uri": "tcp:" + net.JoinHostPort(host.String(), strconv.Itoa(migrationPort))}
	here, there := watchMigration(ctx, u.source), watchMigration(ctx, destination)
	defer there.end()
	if err := destination.Run(ctx, "migrate-incoming", uri, nil); err != nil {
		here.end()
		return nil, fmt.Errorf("destination: %w", err)
	}
	if err := u.source.Run(ctx, "migrate", uri, nil); err != nil {
		here.end()
		return nil, fmt.Errorf("source: %w", err)
	}
	select {
	case <-there.done:
	case <-here.done:
		if here.err == nil {
			<-there.done
		}
	}
	switch {
	case there.over() && there.err != nil:
		here.end()
		return nil, fmt.Errorf("destination: %w", there.err)
	case here.over() && here.err != nil:
		return nil, fmt.Errorf("source: %w", here.err)
	}
	return func() error {
		<-here.done
		return here.err
	}, nil
}

// watched follows one side of a migration to its end.
type watched struct {
	done chan struct{}
	err  error // why it failed; to be read once done is closed
	end  func()
}

func watchMigration(ctx context.Context, o *qemu.Observer) *watched {
	ctx, cancel := context.WithCancel(ctx)
	w := &watched{done: make(chan struct{})}
	w.end = func() { cancel(); <-w.done }
	events := o.Events()
	go func() {
		defer cancel()
		defer close(w.done)
		defer events.Close()
		w.err = awaitCompleted(ctx, events)
	}()
	return w
}

func (w *watched) over() bool {
	select {
	case <-w.done:
		return true
	default:
		return false
	}
}

// awaitCompleted waits for the end of a migration.
func awaitCompleted(ctx context.Context, events *qemu.Events) error {
	for {
		e, err := events.Next(ctx)
		if err != nil {
			return err
		}
		if e.Name != "MIGRATION" {
			continue
		}
		switch status := e.Text("status"); status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("QEMU's migration %s", status)
		}
	}
}

// precopyAccount is what QEMU says of the migration that it has done.
func precopyAccount(ctx context.Context, source *qemu.Observer) (Own, error) {
	var said struct {
		Downtime int64 `json:"downtime"` // ms
		RAM      struct {
			Syncs int `json:"dirty-sync-count"`
		} `json:"ram"`
	}
	if err := source.Run(ctx, "query-migrate", nil, &said); err != nil {
		return Own{}, err
	}
	return Own{Downtime: time.Duration(said.Downtime) * time.Millisecond, Passes: said.RAM.Syncs}, nil
}
