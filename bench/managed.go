package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
	"github.com/lmctl/lmctl/migrate"
)

// managed is a guest of the lab's agents, which lmctl migrates.
type managed struct {
	b      *bed
	name   string
	uuid   string
	at     int
	agents [2]*api.Client
}

func startManaged(ctx context.Context, b *bed, name string, w Workload, at int) (subject, error) {
	definition, err := b.definition(name, w)
	if err != nil {
		return nil, err
	}
	m := &managed{b: b, name: name, at: at}
	if err := m.start(ctx, definition); err != nil {
		return nil, errors.Join(err, m.close(ctx))
	}
	return m, nil
}

func (m *managed) start(ctx context.Context, definition []byte) error {
	for i, host := range m.b.hosts {
		c, err := api.Dial(api.Target{Socket: m.b.lab.AgentSocket(host)})
		if err != nil {
			return err
		}
		m.agents[i] = c
	}
	g, err := m.agents[m.at].Guests.Define(ctx, &lmctlv1.DefineRequest{Definition: definition})
	if err != nil {
		return err
	}
	m.uuid = g.Uuid
	_, err = m.agents[m.at].Guests.Start(ctx, &lmctlv1.GuestRequest{Name: m.name})
	return err
}

func (m *managed) placeAt(at int) place {
	p := place{host: m.b.hosts[at], memory: memoryFile(m.b.lab.MemoryDir(m.b.hosts[at]), m.uuid)}
	// One that is not there yet, or whose agent is not, has no process.
	if g, err := m.agents[at].Guests.Show(m.b.ctx, &lmctlv1.GuestRequest{Name: m.name}); err == nil {
		p.console, p.pid, p.accelerator = g.ConsolePath, int(g.Pid), g.Accelerator
	}
	return p
}

func (m *managed) place() place { return m.placeAt(m.at) }

func (m *managed) next() (host string, memory coming) {
	p := m.placeAt(otherHost(m.at))
	return p.host, comingAt(p.memory)
}

func (m *managed) pause(ctx context.Context) error {
	return m.command(ctx, "stop", hypervisor.StatePaused)
}

func (m *managed) resume(ctx context.Context) error {
	return m.command(ctx, "cont", hypervisor.StateRunning)
}

// command gives QEMU a command behind the agent's back, and waits until the
// agent has seen what came of it.
func (m *managed) command(ctx context.Context, command string, state hypervisor.State) error {
	g, err := m.agents[m.at].Guests.Show(ctx, &lmctlv1.GuestRequest{Name: m.name})
	if err != nil {
		return err
	}
	o, err := qemu.Observe(ctx, g.Observer)
	if err != nil {
		return err
	}
	err = o.Run(ctx, command, nil, nil)
	if err = errors.Join(err, o.Close()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	events, err := m.agents[m.at].Guests.Watch(ctx, &lmctlv1.WatchGuestsRequest{Name: m.name})
	if err != nil {
		return err
	}
	for {
		e, err := events.Recv()
		if err != nil {
			return fmt.Errorf("wait for guest %s to be %s: %w", m.name, state, err)
		}
		if e.Guest.GetState() == string(state) {
			return nil
		}
	}
}

func (m *managed) move(ctx context.Context, _ Contender) (account, error) {
	agent := m.agents[m.at]
	started, err := agent.Migrations.Start(ctx, &lmctlv1.StartMigrationRequest{Guest: m.name, Destination: m.b.hosts[otherHost(m.at)]})
	if err != nil {
		return nil, err
	}
	updates, err := agent.Migrations.Watch(ctx, &lmctlv1.MigrationRequest{Id: started.Id})
	if err != nil {
		return nil, err
	}
	for {
		u, err := updates.Recv()
		if err != nil {
			return nil, fmt.Errorf("watch migration %s: %w", started.Id, err)
		}
		if u.Finished {
			return m.finish(u)
		}
	}
}

// finish is the end of a migration.
func (m *managed) finish(u *lmctlv1.Migration) (account, error) {
	var r migrate.Report
	if err := json.Unmarshal(u.Report, &r); err != nil {
		return nil, fmt.Errorf("report of migration %s: %w", u.Id, err)
	}
	if r.Result != migrate.Completed {
		return nil, fmt.Errorf("migration %s: %s", r.Result, r.Error)
	}
	m.at = otherHost(m.at)
	return said(ownReport(&r)), nil
}

// ownReport is what lmctl's report says.
func ownReport(r *migrate.Report) Own {
	p := r.DowntimeParts
	return Own{
		Downtime: r.Downtime, Passes: len(r.Passes), Reason: string(r.SwitchoverReason),
		Parts: []Part{
			{"stop", p.Stop}, {"final scan", p.FinalScan}, {"final copy", p.FinalCopy}, {"state save", p.StateSave},
			{"state load", p.StateLoad}, {"commit", p.Commit}, {"resume", p.Resume},
		},
	}
}

func (m *managed) close(ctx context.Context) error {
	var errs []error
	for _, c := range m.agents {
		if c == nil {
			continue
		}
		req := &lmctlv1.GuestRequest{Name: m.name}
		g, err := c.Guests.Show(ctx, req)
		if err == nil {
			if g.State != string(hypervisor.StateStopped) {
				_, err = c.Guests.Destroy(ctx, req)
			}
			if err == nil {
				_, err = c.Guests.Undefine(ctx, req)
			}
		}
		var said *api.Error
		if errors.As(err, &said) && said.Code == codes.NotFound {
			err = nil
		}
		errs = append(errs, err, c.Close())
	}
	return errors.Join(errs...)
}
