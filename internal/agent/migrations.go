package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/migrate"
)

// migrationService is what operators may ask about migrations.
type migrationService struct {
	lmctlv1.UnimplementedMigrationsServer
	a *Agent
}

// Start implements lmctlv1.MigrationsServer.
func (s *migrationService) Start(_ context.Context, in *lmctlv1.StartMigrationRequest) (*lmctlv1.Migration, error) {
	opts, err := s.options(in.GetOptions())
	if err != nil {
		return nil, &api.Error{Code: codes.InvalidArgument, Operation: "migrate guest", Object: in.GetGuest(), Cause: err.Error()}
	}
	mv, err := s.a.moves.start(in.GetGuest(), in.GetDestination(), opts)
	if err != nil {
		return nil, err
	}
	return s.toWire(s.a.moves.snapshot(mv))
}

// options are the engine's, from a request over the configuration.
func (s *migrationService) options(in *lmctlv1.MigrationOptions) (migrate.Options, error) {
	c := s.a.cfg.Migration
	o := migrate.Options{MaxPasses: c.MaxPasses, DowntimeTarget: c.DowntimeTarget, Bandwidth: int64(c.Bandwidth),
		Streams: c.Streams, Timeout: c.Timeout, Verify: in.GetVerify(), Mode: migrate.Mode(in.GetMode()), Compress: in.GetCompress()}
	if in != nil && in.MaxPasses != nil {
		o.MaxPasses = int(in.GetMaxPasses())
	}
	if in != nil && in.Bandwidth != nil {
		o.Bandwidth = in.GetBandwidth()
	}
	if in != nil && in.Streams != nil {
		o.Streams = int(in.GetStreams())
	}
	if d := in.GetDowntimeTarget(); d != nil {
		o.DowntimeTarget = d.AsDuration()
	}
	if d := in.GetTimeout(); d != nil {
		o.Timeout = d.AsDuration()
	}
	switch {
	case o.Mode != "" && o.Mode != migrate.Direct && o.Mode != migrate.Relay:
		return o, fmt.Errorf("mode %q: there are %s and %s", o.Mode, migrate.Direct, migrate.Relay)
	case o.Mode == migrate.Direct && o.Compress:
		return o, errors.New("compression is for relay mode: in direct mode only pages travel that are not zero, uncompressed")
	case o.MaxPasses < 1:
		return o, fmt.Errorf("max passes %d: must be at least 1", o.MaxPasses)
	case o.Streams < 1 || o.Streams > migrate.MaxStreams:
		return o, fmt.Errorf("streams %d: must be 1 to %d", o.Streams, migrate.MaxStreams)
	case o.Bandwidth < 0:
		return o, fmt.Errorf("bandwidth %d: must not be negative", o.Bandwidth)
	case o.DowntimeTarget <= 0:
		return o, fmt.Errorf("downtime target %s: must be more than nothing", o.DowntimeTarget)
	case o.Timeout < 0:
		return o, fmt.Errorf("timeout %s: must not be negative", o.Timeout)
	}
	return o, nil
}

// watchPause is how long at least lies between two messages of a watch: a
// terminal needs no more.
const watchPause = 50 * time.Millisecond

// Watch implements lmctlv1.MigrationsServer.
func (s *migrationService) Watch(in *lmctlv1.MigrationRequest, stream grpc.ServerStreamingServer[lmctlv1.Migration]) error {
	mv, err := s.a.moves.find(in.GetId())
	if err != nil {
		return err
	}
	pause := time.NewTicker(watchPause)
	defer pause.Stop()
	for {
		snap := s.a.moves.snapshot(mv)
		m, err := s.toWire(snap)
		if err != nil {
			return err
		}
		if err := stream.Send(m); err != nil || snap.done() {
			return err
		}
		select {
		case <-snap.changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
		select {
		case <-pause.C:
		case <-mv.over: // the end is told at once
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// Cancel implements lmctlv1.MigrationsServer.
func (s *migrationService) Cancel(_ context.Context, in *lmctlv1.MigrationRequest) (*lmctlv1.Migration, error) {
	mv, err := s.a.moves.find(in.GetId())
	if err != nil {
		return nil, err
	}
	snap := s.a.moves.snapshot(mv)
	if snap.done() {
		return nil, &api.Error{Code: codes.FailedPrecondition, Operation: "cancel migration", Object: mv.id,
			Cause: fmt.Sprintf("it has ended: %s", snap.report.Result)}
	}
	mv.cancel(errCancelled)
	return s.toWire(snap)
}

// List implements lmctlv1.MigrationsServer.
func (s *migrationService) List(_ context.Context, in *lmctlv1.ListMigrationsRequest) (*lmctlv1.ListMigrationsResponse, error) {
	out := &lmctlv1.ListMigrationsResponse{}
	all := s.a.moves.list()
	for i := len(all) - 1; i >= 0; i-- {
		if in.GetGuest() != "" && all[i].guest != in.GetGuest() {
			continue
		}
		m, err := s.toWire(s.a.moves.snapshot(all[i]))
		if err != nil {
			return nil, err
		}
		out.Migrations = append(out.Migrations, m)
	}
	return out, nil
}

// Show implements lmctlv1.MigrationsServer.
func (s *migrationService) Show(_ context.Context, in *lmctlv1.MigrationRequest) (*lmctlv1.Migration, error) {
	mv, err := s.a.moves.find(in.GetId())
	if err != nil {
		return nil, err
	}
	return s.toWire(s.a.moves.snapshot(mv))
}

func (s *migrationService) toWire(snap snapshot) (*lmctlv1.Migration, error) {
	m := &lmctlv1.Migration{
		Id: snap.id, Guest: snap.guest, Source: s.a.cfg.Name, Destination: snap.destination,
		State: string(snap.progress.State), Started: timestamppb.New(snap.started), Progress: progressToWire(snap.progress),
	}
	if !snap.done() {
		return m, nil
	}
	report, err := json.Marshal(snap.report)
	if err != nil {
		return nil, fmt.Errorf("agent: report of migration %s: %w", snap.id, err)
	}
	m.Finished, m.Ended, m.Report = true, timestamppb.New(snap.ended), report
	m.Result, m.Error = string(snap.report.Result), snap.report.Error
	if m.State == "" { // read from disk
		m.State = string(stateOfResult(snap.report.Result))
		m.Progress.Passes = passesToWire(snap.report.Passes)
		m.Progress.BytesSent = snap.report.BytesSent
	}
	return m, nil
}

func stateOfResult(r migrate.Result) migrate.State {
	switch r {
	case migrate.Completed:
		return migrate.SourceDone
	case migrate.InDoubt:
		return migrate.SourceInDoubt
	}
	return migrate.SourceAborted
}

func progressToWire(p migrate.Progress) *lmctlv1.Progress {
	return &lmctlv1.Progress{
		Pass: int32(p.Pass), CopiedPages: p.CopiedPages, PassPages: p.PassPages,
		BytesSent: p.BytesSent, Rate: p.Rate, Passes: passesToWire(p.Passes),
	}
}

func passesToWire(passes []migrate.Pass) []*lmctlv1.Pass {
	out := make([]*lmctlv1.Pass, len(passes))
	for i, p := range passes {
		out[i] = &lmctlv1.Pass{N: int32(p.N), Pages: p.Pages, ZeroPages: p.ZeroPages, Bytes: p.Bytes,
			Duration: durationpb.New(p.Duration), DirtyAfter: p.DirtyAfter}
	}
	return out
}
