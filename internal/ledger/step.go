package ledger

import (
	"fmt"

	"github.com/lmctl/lmctl/migrate"
)

// Op is a change of a record that the engine, the agent or the operator asks
// for. The first ten are those of the engine's ledgers.
type Op string

// The operations.
const (
	OpBegin    Op = "begin"
	OpHandOver Op = "hand-over"
	OpReclaim  Op = "reclaim"
	OpCancel   Op = "cancel"
	OpForget   Op = "forget"
	OpPrepare  Op = "prepare"
	OpAccept   Op = "accept"
	OpOwn      Op = "own"
	OpWithdraw Op = "withdraw"
	OpDrop     Op = "drop"
	OpDefine   Op = "define"   // a new guest is this host's
	OpUndefine Op = "undefine" // the operator removed it
	OpYield    Op = "yield"    // another owner has the higher epoch
	OpContest  Op = "contest"  // another owner has the higher epoch, and the guest ran here
	OpClaim    Op = "claim"    // the operator's word: the guest is this host's
	OpDiscard  Op = "discard"  // the operator's word: what is noted here is worth nothing
)

// StateError says that an operation does not follow the record there is.
type StateError struct {
	Op     Op
	Guest  string
	State  State
	Reason string
}

func (e *StateError) Error() string {
	state := string(e.State)
	if e.State == None {
		state = "unknown here"
	}
	return fmt.Sprintf("ledger: %s guest %s, which is %s: %s", e.Op, e.Guest, state, e.Reason)
}

// Step is the record that follows r by op for h, in the given boot of the
// host. It is pure. Define, Undefine, Yield, Contest, Claim
// and Discard use only h.Guest, h.UUID and, for Yield and Claim, h.Epoch: the highest epoch known of other hosts.
// Time is left to the caller. A record in None is to be removed.
func Step(r Record, op Op, h migrate.Handover, boot string) (Record, error) {
	next := Record{Guest: h.Guest, UUID: h.UUID, Epoch: h.Epoch, Handover: &h, Boot: boot}
	fail := func(format string, args ...any) (Record, error) {
		return r, &StateError{Op: op, Guest: h.Guest, State: r.State, Reason: fmt.Sprintf(format, args...)}
	}
	if r.State == Damaged && op != OpClaim && op != OpDiscard {
		return fail("its record is damaged; see `lmctl guest claim`")
	}
	same := r.handover() == h.ID
	switch op {
	case OpBegin, OpHandOver, OpReclaim, OpCancel, OpForget:
		return stepSource(r, op, next, same, fail)
	case OpPrepare, OpAccept, OpOwn, OpWithdraw, OpDrop:
		return stepDestination(r, op, next, same, fail)
	case OpDefine:
		if r.State != None && r.State != Gone {
			return fail("a guest of this name is being kept")
		}
		next.State, next.Epoch, next.Handover = Owned, 1, nil
	case OpUndefine:
		if r.State != Owned && r.State != Contested {
			return fail("only its owner may remove it")
		}
		next = r
		next.State, next.Handover, next.Boot = Gone, nil, boot
	case OpYield:
		if !r.owns() || h.Epoch < r.Epoch {
			return fail("another owner's epoch %d does not outrank this host's %d", h.Epoch, r.Epoch)
		}
		next.State, next.Handover = Gone, nil
	case OpContest:
		if r.State != Owned && r.State != Contested {
			return fail("only an owner can be outranked")
		}
		next = r
		next.State, next.Boot = Contested, boot
	case OpClaim:
		next.State, next.Epoch, next.Handover = Owned, max(r.Epoch, h.Epoch)+1, nil
	case OpDiscard:
		if r.State != Prepared && r.State != Withdrawn && r.State != Damaged {
			return fail("only a guest that was never this host's for certain can be discarded")
		}
		return Record{Guest: h.Guest}, nil
	default:
		return fail("no such operation")
	}
	return next, nil
}

type failFunc func(format string, args ...any) (Record, error)

// stepSource is Step for the source's side of a handover.
func stepSource(r Record, op Op, next Record, same bool, fail failFunc) (Record, error) {
	h := next.Handover
	if r.State == None || r.UUID != h.UUID {
		return fail("this host has no guest with UUID %s", h.UUID)
	}
	switch op {
	case OpBegin:
		if r.State != Owned || same || h.Epoch != r.Epoch+1 {
			return fail("only its owner at epoch %d may begin to hand it over", h.Epoch-1)
		}
		next.State, next.Epoch = Moving, r.Epoch
	case OpHandOver:
		if r.State != Moving || !same {
			return fail("handover %s has not begun or was cancelled", h.ID)
		}
		next.State = HandedOver
	case OpCancel:
		if r.State == Owned {
			return r, nil // never begun, or cancelled before
		}
		if r.State != Moving || !same {
			return fail("handover %s can no longer be cancelled", h.ID)
		}
		next.State, next.Epoch, next.Handover = Owned, r.Epoch, nil
	case OpReclaim:
		if r.State == Owned && r.Epoch == h.Epoch+1 {
			return r, nil // reclaimed before
		}
		if r.State != HandedOver || !same {
			return fail("it was not handed over by %s", h.ID)
		}
		next.State, next.Epoch, next.Handover = Owned, h.Epoch+1, nil
	case OpForget:
		if r.State == Gone && same {
			return r, nil
		}
		if r.State != HandedOver || !same {
			return fail("it was not handed over by %s", h.ID)
		}
		next.State = Gone
	}
	return next, nil
}

// stepDestination is Step for the destination's side.
func stepDestination(r Record, op Op, next Record, same bool, fail failFunc) (Record, error) {
	h := next.Handover
	switch op {
	case OpPrepare:
		if why := whyNotPrepare(r, *h); why != "" {
			return fail("%s", why)
		}
		next.State = Prepared
	case OpAccept:
		if r.State == Accepted && same {
			return r, nil
		}
		if r.State != Prepared || !same {
			return fail("no shell was prepared for handover %s", h.ID)
		}
		if r.Boot != next.Boot {
			return fail("the shell of handover %s ended when this host restarted", h.ID)
		}
		next.State = Accepted
	case OpOwn:
		if r.State == Owned && same {
			return r, nil
		}
		// A shell of another boot may have run or not; it is the caller who
		// knows that the guest was handed over.
		stale := r.State == Prepared && r.Boot != next.Boot
		if !same || (r.State != Accepted && !stale) {
			return fail("handover %s was not accepted", h.ID)
		}
		next.State = Owned
	case OpWithdraw:
		if r.State == Withdrawn && same {
			return r, nil
		}
		here := same && (r.State == Prepared || r.State == Accepted)
		if here && r.Boot != next.Boot {
			return fail("this host has restarted since, so that it cannot tell whether the guest ran")
		}
		fresh := !same && (r.State == None || r.State == Gone || r.State == Withdrawn)
		if !fresh && !here {
			return fail("handover %s can no longer be withdrawn", h.ID)
		}
		next.State = Withdrawn
	case OpDrop:
		if r.State == None || !same {
			return r, nil // nothing of h is noted here
		}
		if r.State != Prepared && r.State != Withdrawn {
			return fail("handover %s is not waiting to be dropped", h.ID)
		}
		return Record{Guest: h.Guest}, nil
	}
	return next, nil
}

// whyNotPrepare says why a host with record r must not prepare for h.
func whyNotPrepare(r Record, h migrate.Handover) string {
	switch r.State {
	case None:
		return ""
	case Gone:
		if r.handover() == h.ID {
			return "this handover has been seen before"
		}
		if r.Handover != nil && r.UUID == h.UUID && h.Epoch <= r.Epoch {
			return fmt.Sprintf("the offer has epoch %d, but the guest left this host at epoch %d", h.Epoch, r.Epoch)
		}
		return ""
	case Withdrawn:
		if r.handover() == h.ID {
			return "this handover was withdrawn"
		}
		// The same source can only begin again once it has dealt with the last
		// one; another's may still need the answer.
		if r.Handover.Source != h.Source && r.UUID == h.UUID && h.Epoch <= r.Epoch {
			return fmt.Sprintf("host %s may still ask about handover %s", r.Handover.Source, r.Handover.ID)
		}
		return ""
	case Owned, Moving:
		return "a guest of this name is this host's"
	}
	return "an earlier handover of it is not settled yet; see `lmctl guest show " + h.Guest + "`"
}
