package agent

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/lmctl/lmctl/internal/ledger"
	"github.com/lmctl/lmctl/migrate"
)

// moveRecord is a migration on disk. One without an end was under way when its
// agent ended: its report says only which migration it was.
type moveRecord struct {
	Started time.Time       `json:"started"`
	Ended   time.Time       `json:"ended,omitzero"`
	Report  *migrate.Report `json:"report"`
}

func readMove(path string) (moveRecord, error) {
	var r moveRecord
	text, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, err
	}
	if r.Report == nil {
		return r, errors.New("it holds no report")
	}
	return r, nil
}

// keep writes a migration's record. A migration does not fail for want of one.
func (m *moves) keep(id string, r moveRecord) {
	text, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = writeReport(filepath.Join(m.dir, id+".json"), text)
	}
	if err != nil {
		m.a.log.Error("keep a migration's report", "migration", id, "error", err)
	}
}

// keepBegun notes that a migration has begun, for the case that the agent does
// not live to see its end.
func (m *moves) keepBegun(mv *move) {
	m.keep(mv.id, moveRecord{Started: mv.started, Report: &migrate.Report{
		ID: mv.id, Guest: mv.guest, Source: m.a.cfg.Name, Destination: mv.destination,
		Mode: "direct", Passes: []migrate.Pass{},
	}})
}

// close ends a record whose agent ended before its migration, by what the
// ledger says.
func (m *moves) close(r *moveRecord) {
	r.Ended = time.Now()
	rep := r.Report
	rep.Result, rep.Error = outcome(m.a.ledger.Get(rep.Guest), rep.ID)
	const ended = "the agent ended during the migration"
	if rep.Error == "" {
		rep.Error = ended
	} else {
		rep.Error = ended + "; " + rep.Error
	}
	m.keep(rep.ID, *r)
}

// outcome is what a guest's record says of a migration that its engine did not
// bring to an end, and what is to be added to that.
func outcome(r ledger.Record, id string) (migrate.Result, string) {
	same := r.Handover != nil && r.Handover.ID == id
	switch {
	case r.State == ledger.Owned, r.State == ledger.Moving:
		return migrate.Failed, ""
	case same && r.State == ledger.HandedOver:
		return migrate.InDoubt, "the guest had been handed over, and the destination has not said yet that it has it"
	case same && r.State == ledger.Gone:
		return migrate.Completed, "the destination has the guest, but what was measured is lost"
	}
	return migrate.InDoubt, "this host's record does not say what came of it"
}

// settled brings the reports of a guest's migrations up to date that ended in
// doubt, once its record says what came of them.
func (m *moves) settled(r ledger.Record, host string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, mv := range m.all {
		if mv.guest != r.Guest || mv.report == nil || mv.report.Result != migrate.InDoubt {
			continue
		}
		rep := *mv.report
		switch {
		case r.State == ledger.Gone && r.Handover != nil && r.Handover.ID == mv.id:
			rep.Result, rep.Error = migrate.Completed, "settled after it was in doubt: "+rep.Error
		case r.State == ledger.Owned && r.Handover == nil:
			rep.Result, rep.Error = migrate.Failed, "host "+host+" took the guest back after it was in doubt: "+rep.Error
		default:
			continue
		}
		mv.report = &rep
		if mv.progress.State != "" {
			mv.progress.State = stateOfResult(rep.Result)
		}
		m.keep(mv.id, moveRecord{Started: mv.started, Ended: mv.ended, Report: &rep})
	}
}

// writeReport replaces a file in one step.
func writeReport(path string, text []byte) error {
	temp := path + ".new"
	if err := os.WriteFile(temp, text, 0o600); err != nil {
		return err
	}
	return os.Rename(temp, path)
}
