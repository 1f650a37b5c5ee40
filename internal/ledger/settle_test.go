package ledger

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/migrate"
)

var update = flag.Bool("update", false, "write golden files anew")

// variant is a record that one side can have, by a name for the table.
type variant struct {
	name   string
	record Record
}

// sourceVariants and destinationVariants are the records around handover "h",
// of epoch 5, and around others of the same guest.
func variants() []variant {
	h := modelHandover
	other := h
	other.ID = "x"
	onward := migrate.Handover{ID: "y", Guest: "g", UUID: "u", Source: "dst", Destination: "third", Epoch: 6}
	mk := func(name string, state State, epoch uint64, h *migrate.Handover, boot string) variant {
		return variant{name, Record{State: state, Guest: "g", UUID: "u", Epoch: epoch, Handover: h, Boot: boot}}
	}
	stranger := mk("owned-other-guest", Owned, 9, nil, "now")
	stranger.record.UUID = "another"
	return []variant{
		{"none", Record{Guest: "g"}},
		mk("owned-4", Owned, 4, nil, "now"),
		mk("owned-5-by-h", Owned, 5, &h, "now"),
		mk("owned-6", Owned, 6, nil, "now"),
		mk("moving-h", Moving, 4, &h, "now"),
		mk("handed-over-h", HandedOver, 5, &h, "now"),
		mk("handed-over-x", HandedOver, 5, &other, "now"),
		mk("handed-over-y", HandedOver, 6, &onward, "now"),
		mk("prepared-h", Prepared, 5, &h, "now"),
		mk("prepared-h-rebooted", Prepared, 5, &h, "before"),
		mk("accepted-h", Accepted, 5, &h, "now"),
		mk("accepted-h-rebooted", Accepted, 5, &h, "before"),
		mk("withdrawn-h", Withdrawn, 5, &h, "now"),
		mk("withdrawn-x", Withdrawn, 5, &other, "now"),
		mk("gone-3", Gone, 3, nil, "now"),
		mk("gone-h", Gone, 5, &h, "now"),
		mk("contested-5", Contested, 5, nil, "now"),
		{"damaged", Record{State: Damaged, Guest: "g"}},
		stranger,
	}
}

// sideOf is the host that a variant's record is at home on.
func hostsOf(r Record) (own, peer string) {
	switch r.State {
	case Prepared, Accepted, Withdrawn:
		return "dst", "src"
	}
	if r.Handover != nil && r.Handover.Source == "dst" || r.State == Owned && r.Epoch == 5 {
		return "dst", "src"
	}
	return "src", "dst"
}

// TestDecideTable holds every pair of records against a golden table: what a
// host with the record on the left does when the other says what is above.
func TestDecideTable(t *testing.T) {
	var out bytes.Buffer
	for _, own := range variants() {
		host, peerHost := hostsOf(own.record)
		for _, c := range []Copy{NoCopy, PausedCopy, RunningCopy, UnknownCopy} {
			fmt.Fprintf(&out, "%s, %s\n", own.name, c)
			f := Facts{Host: host, Boot: "now", Copy: c}
			line := func(name string, peer *Statement) {
				fmt.Fprintf(&out, "\t%-28s %s\n", name, Decide(own.record, f, peer).Action)
			}
			line("(silent)", nil)
			for _, peer := range variants() {
				s := Say(peer.record, Facts{Host: peerHost})
				line(peer.name, &s)
			}
			s := Say(Record{Guest: "g"}, Facts{Host: peerHost, Busy: true})
			line("none, busy", &s)
			s = Say(variants()[1].record, Facts{Host: peerHost, Busy: true})
			line("owned-4, busy", &s)
		}
	}
	golden(t, "settle.golden", out.Bytes())
}

// TestStepTable holds every operation on every record against a golden table.
func TestStepTable(t *testing.T) {
	var out bytes.Buffer
	ops := []Op{OpBegin, OpHandOver, OpReclaim, OpCancel, OpForget, OpPrepare, OpAccept, OpOwn,
		OpWithdraw, OpDrop, OpDefine, OpUndefine, OpYield, OpContest, OpClaim, OpDiscard}
	for _, v := range variants() {
		fmt.Fprintf(&out, "%s\n", v.name)
		for _, op := range ops {
			next, err := Step(v.record, op, modelHandover, "now")
			if err != nil {
				fmt.Fprintf(&out, "\t%-10s %v\n", op, err)
				continue
			}
			state := string(next.State)
			if next.State == None {
				state = "(removed)"
			}
			fmt.Fprintf(&out, "\t%-10s -> %s epoch %d %s\n", op, state, next.Epoch, next.handover())
		}
	}
	golden(t, "step.golden", out.Bytes())
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	a, b := strings.Split(string(got), "\n"), strings.Split(string(want), "\n")
	for i := range max(len(a), len(b)) {
		if i >= len(a) || i >= len(b) || a[i] != b[i] {
			t.Fatalf("%s differs at line %d (run with -update and read the difference)", name, i+1)
		}
	}
}

// TestDoubtSaysWhatToDo: whoever is left with a decision is told which.
func TestDoubtSaysWhatToDo(t *testing.T) {
	for _, own := range variants() {
		host, peerHost := hostsOf(own.record)
		for _, peer := range variants() {
			s := Say(peer.record, Facts{Host: peerHost})
			d := Decide(own.record, Facts{Host: host, Boot: "now", Copy: PausedCopy}, &s)
			if d.Reason == "" {
				t.Errorf("%s hearing %s: %s without a reason", own.name, peer.name, d.Action)
			}
			if d.Action == Doubt && !strings.Contains(d.Reason, "lmctl guest claim g --force") {
				t.Errorf("%s hearing %s: doubt without a way out: %s", own.name, peer.name, d.Reason)
			}
		}
	}
}

func TestBusyHostLeavesItToTheEngine(t *testing.T) {
	for _, own := range variants() {
		if d := Decide(own.record, Facts{Busy: true, Copy: PausedCopy}, nil); d.Action != Rest {
			t.Errorf("%s while a migration is under way: %s", own.name, d.Action)
		}
	}
}

// TestUnknownCopyIsLeftAlone: nothing follows from not being able to look.
func TestUnknownCopyIsLeftAlone(t *testing.T) {
	for _, own := range variants() {
		host, peerHost := hostsOf(own.record)
		for _, peer := range variants() {
			s := Say(peer.record, Facts{Host: peerHost})
			if d := Decide(own.record, Facts{Host: host, Boot: "now", Copy: UnknownCopy}, &s); d.Action != Wait {
				t.Errorf("%s hearing %s: %s of a copy that cannot be reached", own.name, peer.name, d.Action)
			}
		}
	}
}

// TestClaimsMeet: two hosts whose operators have both claimed a guest do not
// both keep it, and what has run is not thrown away.
func TestClaimsMeet(t *testing.T) {
	a := Record{State: Owned, Guest: "g", UUID: "u", Epoch: 6}
	for _, tc := range []struct {
		name         string
		mine, theirs uint64
		copy         Copy
		want         Action
	}{
		{"lower, running", 6, 7, RunningCopy, Suspend},
		{"lower, paused", 6, 7, PausedCopy, Yield},
		{"higher, running", 7, 6, RunningCopy, Rest},
		{"same, name sorts first", 6, 6, RunningCopy, Suspend},
	} {
		a.Epoch = tc.mine
		peer := Statement{Host: "alpha", Guest: "g", UUID: "u", State: Owned, Epoch: tc.theirs}
		if d := Decide(a, Facts{Host: "beta", Boot: "now", Copy: tc.copy}, &peer); d.Action != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, d.Action, tc.want)
		}
	}
}

// What another hand has brought to a host whose hypervisor others use too is no
// copy of what was withdrawn here. Where nobody else may, it is in doubt.
func TestDecideForeign(t *testing.T) {
	h := modelHandover
	record := func(s State) Record {
		return Record{State: s, Guest: "g", UUID: "u", Epoch: 5, Handover: &h, Boot: "now"}
	}
	says := func(s State, h *migrate.Handover) *Statement {
		return &Statement{Host: "src", Guest: "g", UUID: "u", State: s, Epoch: 5, Handover: h}
	}
	for _, test := range []struct {
		own     State
		peer    *Statement
		foreign bool
		want    Action
	}{
		{Prepared, says(Gone, nil), true, Withdraw},
		{Prepared, says(Owned, nil), true, Withdraw},
		{Prepared, says(Moving, &h), true, Wait},
		{Prepared, nil, true, Ask},
		{Withdrawn, says(Gone, nil), true, Drop},
		{Withdrawn, says(Owned, nil), true, Drop},
		{Withdrawn, says(HandedOver, &h), true, Wait},
		{Withdrawn, says(Moving, &h), true, Wait},
		{Withdrawn, nil, true, Ask},
		{Withdrawn, says(Gone, nil), false, Doubt},
		{Withdrawn, nil, false, Doubt},
	} {
		f := Facts{Host: "dst", Boot: "now", Copy: RunningCopy, Foreign: test.foreign}
		if d := Decide(record(test.own), f, test.peer); d.Action != test.want {
			t.Errorf("%s here, foreign %v, %+v there: %s (%s), want %s", test.own, test.foreign, test.peer, d.Action, d.Reason, test.want)
		}
	}
}
