package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/migrate"
)

// errCancelled is why a migration's context ends when somebody asks for it.
var errCancelled = errors.New("cancelled")

// moves are the migrations away from this host: those under way and, on disk
// too, the last ones.
type moves struct {
	a   *Agent
	dir string

	mu       sync.Mutex
	all      []*move // the oldest first
	stopping bool
	wg       sync.WaitGroup
}

// move is one migration.
type move struct {
	id, guest, destination string
	started                time.Time
	cancel                 context.CancelCauseFunc
	over                   chan struct{} // closed at the end

	// Guarded by the moves' mu.
	progress migrate.Progress
	counted  counted // of this migration, in the metrics
	ended    time.Time
	report   *migrate.Report // once ended
	changed  chan struct{}   // closed and replaced with every change
}

func newMoves(a *Agent) (*moves, error) {
	m := &moves{a: a, dir: filepath.Join(a.cfg.StateDir, "migrations")}
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	entries, err := os.ReadDir(m.dir)
	if err != nil {
		return nil, fmt.Errorf("agent: reports: %w", err)
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		r, err := readMove(filepath.Join(m.dir, e.Name()))
		if err != nil || r.Report.ID != id {
			a.log.Warn("a migration's report cannot be read", "file", e.Name(), "error", err)
			continue
		}
		if r.Ended.IsZero() {
			m.close(&r)
		}
		m.all = append(m.all, &move{id: id, cancel: func(error) {}, guest: r.Report.Guest, destination: r.Report.Destination,
			started: r.Started, ended: r.Ended, report: r.Report, changed: make(chan struct{})})
	}
	slices.SortFunc(m.all, func(x, y *move) int { return x.started.Compare(y.started) })
	return m, nil
}

// refusedError is a migration that was refused before anything was done.
func refusedError(guest, format string, args ...any) error {
	cause := fmt.Sprintf(format, args...)
	return &api.Error{Code: codes.FailedPrecondition, Operation: "migrate guest", Object: guest, Cause: cause,
		Result: string(migrate.Refused), Reasons: []string{cause}}
}

// admit says why a guest cannot be moved to a host, whatever its hypervisor says.
func (m *moves) admit(guest, destination string) error {
	if destination == m.a.cfg.Name {
		return refusedError(guest, "it is on host %s already", destination)
	}
	if _, err := m.a.peers.address(destination); err != nil {
		return refusedError(guest, "%v", err)
	}
	if _, err := m.a.driver.Get(guest); err != nil {
		return err
	}
	m.a.know(m.a.life, guest)
	if err := m.a.ledger.Owns(guest); err != nil {
		return refusedError(guest, "%v", err)
	}
	return nil
}

// start begins to move a guest.
func (m *moves) start(guest, destination string, opts migrate.Options) (*move, error) {
	if err := m.admit(guest, destination); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(m.a.life)
	mv, err := m.register(guest, destination, cancel)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	held, err := m.a.driver.Source(guest)
	if err != nil {
		cancel(nil)
		m.unregister(mv)
		return nil, refusedError(guest, "%v", err)
	}
	m.keepBegun(mv)
	go func() {
		defer m.wg.Done()
		defer cancel(nil)
		m.run(ctx, mv, held, opts)
	}()
	return mv, nil
}

// room says why no migration of a guest can begin now.
func (m *moves) room(guest string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.roomFor(guest)
}

// roomFor is room with the mu held.
func (m *moves) roomFor(guest string) error {
	active := 0
	for _, mv := range m.all {
		if mv.report != nil {
			continue
		}
		active++
		if mv.guest == guest {
			return refusedError(guest, "it is being migrated to host %s already, by %s", mv.destination, mv.id)
		}
	}
	if active >= m.a.cfg.Limits.Migrations {
		return refusedError(guest, "%d migrations are under way, as many as limits.migrations allows", active)
	}
	return nil
}

// register takes the guest's place among the migrations.
func (m *moves) register(guest, destination string, cancel context.CancelCauseFunc) (*move, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopping {
		return nil, &api.Error{Code: codes.Unavailable, Operation: "migrate guest", Object: guest,
			Cause: "the agent is stopping", Result: string(migrate.Refused)}
	}
	if err := m.roomFor(guest); err != nil {
		return nil, err
	}
	mv := &move{id: uuid.NewString(), guest: guest, destination: destination, started: time.Now(),
		changed: make(chan struct{}), over: make(chan struct{}), progress: migrate.Progress{State: migrate.SourcePreparing}, cancel: cancel}
	m.all = append(m.all, mv)
	m.wg.Add(1)
	return mv, nil
}

func (m *moves) unregister(mv *move) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all = slices.DeleteFunc(m.all, func(x *move) bool { return x == mv })
	m.wg.Done()
}

// run takes a migration to its end and hands what is in doubt to the settler.
func (m *moves) run(ctx context.Context, mv *move, held hypervisor.Source, opts migrate.Options) {
	log := m.a.log.With("guest", mv.guest, "migration", mv.id, "destination", mv.destination)
	log.Info("migration begins")
	report, err := m.a.sender.Migrate(ctx, migrate.Job{
		ID: mv.id, Guest: held, Epoch: m.a.ledger.Get(mv.guest).Epoch, Destination: mv.destination,
		Dial:    func(ctx context.Context) (net.Conn, error) { return m.a.peers.dialMigrate(ctx, mv.destination) },
		Options: opts,
		Observe: func(p migrate.Progress) { m.progress(mv, p) },
	})
	if cerr := held.Close(); cerr != nil {
		log.Error("give the guest back", "error", cerr)
	}
	if err != nil {
		log.Warn("migration ended", "result", report.Result, "error", err)
	} else {
		log.Info("migration completed", "downtime", report.Downtime, "total", report.Total, "passes", len(report.Passes))
	}
	m.mu.Lock()
	m.a.metrics.migrated(&mv.counted, report)
	m.mu.Unlock()
	m.finish(mv, report)
	m.a.know(m.a.life, mv.guest)
	m.a.settler.kick(mv.guest)
}

func (m *moves) progress(mv *move, p migrate.Progress) {
	m.mu.Lock()
	defer m.mu.Unlock()
	mv.progress = p
	m.a.metrics.moving(&mv.counted, mv.guest, p.Passes, p.BytesSent)
	mv.change()
}

// change wakes whoever watches. The moves' mu is held.
func (mv *move) change() {
	close(mv.changed)
	mv.changed = make(chan struct{})
}

// finish keeps the report.
func (m *moves) finish(mv *move, report *migrate.Report) {
	ended := time.Now()
	m.keep(mv.id, moveRecord{Started: mv.started, Ended: ended, Report: report})
	m.mu.Lock()
	mv.ended, mv.report = ended, report
	mv.change()
	close(mv.over)
	stale := m.trim()
	m.mu.Unlock()
	for _, id := range stale {
		if err := os.Remove(filepath.Join(m.dir, id+".json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			m.a.log.Warn("remove an old report", "migration", id, "error", err)
		}
	}
}

// trim forgets all but the last finished migrations. The mu is held.
func (m *moves) trim() (stale []string) {
	finished := 0
	for _, mv := range m.all {
		if mv.report != nil {
			finished++
		}
	}
	m.all = slices.DeleteFunc(m.all, func(mv *move) bool {
		if mv.report == nil || finished <= m.a.cfg.Migration.History {
			return false
		}
		finished--
		stale = append(stale, mv.id)
		return true
	})
	return stale
}

// busy says whether a guest is being moved by an engine right now.
func (m *moves) busy(guest string) bool { return m.of(guest) != nil }

// of is the migration of a guest under way, or nil.
func (m *moves) of(guest string) *move {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, mv := range m.all {
		if mv.guest == guest && mv.report == nil {
			return mv
		}
	}
	return nil
}

// find is a migration by its id or a part of it that fits only one.
func (m *moves) find(id string) (*move, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var found []*move
	for _, mv := range m.all {
		if mv.id == id {
			return mv, nil
		}
		if len(id) >= 4 && strings.HasPrefix(mv.id, id) {
			found = append(found, mv)
		}
	}
	if len(found) == 1 {
		return found[0], nil
	}
	cause := "there is none of this id; see `lmctl migration list`"
	if len(found) > 1 {
		cause = "more than one begins like this: give more of the id"
	}
	return nil, &api.Error{Code: codes.NotFound, Operation: "find migration", Object: id, Cause: cause}
}

func (m *moves) list() []*move {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.all)
}

func (m *moves) active() int {
	n := 0
	for _, mv := range m.list() {
		if !m.snapshot(mv).done() {
			n++
		}
	}
	return n
}

// snapshot is a consistent view of a migration.
type snapshot struct {
	*move
	progress migrate.Progress
	ended    time.Time
	report   *migrate.Report
	changed  <-chan struct{}
}

func (s snapshot) done() bool { return s.report != nil }

func (m *moves) snapshot(mv *move) snapshot {
	m.mu.Lock()
	defer m.mu.Unlock()
	return snapshot{move: mv, progress: mv.progress, ended: mv.ended, report: mv.report, changed: mv.changed}
}

// refuse takes on no more migrations.
func (m *moves) refuse() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stopping = true
}

func (m *moves) cancelAll() {
	for _, mv := range m.list() {
		mv.cancel(errCancelled)
	}
}

// wait returns true once no migration is under way, or false when ctx ends.
func (m *moves) wait(ctx context.Context) bool {
	none := make(chan struct{})
	go func() {
		m.wg.Wait()
		close(none)
	}()
	select {
	case <-none:
		return true
	case <-ctx.Done():
		return false
	}
}
