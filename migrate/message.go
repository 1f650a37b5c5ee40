package migrate

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"
)

// The JSON bodies of control frames; PROTOCOL.md says what each means.
type (
	offerMsg struct {
		Handover   Handover    `json:"handover"`
		Definition []byte      `json:"definition"`
		Mode       Mode        `json:"mode"`
		Blocks     []BlockInfo `json:"blocks"`
		Streams    int         `json:"streams"`
		Verify     bool        `json:"verify"`
	}
	preparedMsg struct {
		Answer []byte `json:"answer,omitempty"` // of the Shell, for the Guest
	}
	refusedMsg struct {
		Reasons []string `json:"reasons"`
	}
	passDoneMsg struct {
		Pass uint32 `json:"pass"`
	}
	stoppedMsg struct {
		Pass uint32 `json:"pass"` // the last pass
	}
	stateEndMsg struct {
		Bytes int64 `json:"bytes"`
	}
	verifiedMsg struct {
		Pages      int64  `json:"pages"`
		Mismatches int64  `json:"mismatches"`
		First      string `json:"first,omitempty"` // the first page that differs, for people
	}
	readyMsg struct {
		Load time.Duration `json:"load_ns"`
	}
	runningMsg struct {
		Resume time.Duration `json:"resume_ns"`
		Error  string        `json:"error,omitempty"` // the vCPUs may run or not: they were started, and that failed
	}
	announcedMsg struct {
		Addresses int    `json:"addresses"`
		Error     string `json:"error,omitempty"`
	}
	reasonMsg struct {
		Reason string `json:"reason"`
	}
)

// check says whether all of a guest's pages are the same at both ends.
func (m *verifiedMsg) check(all int64) error {
	if m.Mismatches != 0 {
		return fmt.Errorf("verify: %d of %d pages differ at the destination, the first is %s", m.Mismatches, m.Pages, m.First)
	}
	if m.Pages != all {
		return violation("%d pages verified, the guest has %d", m.Pages, all)
	}
	return nil
}

// decodeBody is strict: one JSON value, no unknown fields, nothing behind it.
func decodeBody(t controlType, body []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return violation("%v: %v", t, err)
	}
	if _, err := d.Token(); err != io.EOF {
		return violation("%v: data after the body", t)
	}
	return nil
}

// maxEpoch leaves room to count on from any epoch that is accepted.
const maxEpoch = 1 << 62

// check refuses an offer that no honest source makes. peer is who the
// certificate says is speaking; host is this host.
func (m *offerMsg) check(id uuid.UUID, peer, host string) error {
	h := m.Handover
	switch {
	case h.ID != id.String():
		return violation("offer for migration %q on the connection of %s", h.ID, id)
	case h.Source != peer:
		return violation("offer in the name of host %q from host %q", h.Source, peer)
	case h.Destination != host:
		return &Refusal{Reasons: []string{"this is host " + quote(host) + ", the migration is for " + quote(h.Destination) + ": check the source's list of peers"}}
	case h.Guest == "" || len(h.Guest) > 255:
		return violation("guest name of %d bytes", len(h.Guest))
	case h.Epoch == 0 || h.Epoch > maxEpoch:
		return violation("epoch %d", h.Epoch)
	case m.Streams < 1 || m.Streams > MaxStreams:
		return violation("%d streams, 1 to %d are allowed", m.Streams, MaxStreams)
	case m.Mode != Direct && m.Mode != Relay:
		return violation("mode %q", m.Mode)
	case m.Mode == Relay && (len(m.Blocks) != 0 || m.Verify):
		return violation("memory blocks, or their verification, in relay mode")
	case m.Mode == Direct && len(m.Blocks) < 1 || len(m.Blocks) > maxBlocks:
		return violation("%d memory blocks, 1 to %d are allowed", len(m.Blocks), maxBlocks)
	}
	if _, err := uuid.Parse(h.UUID); err != nil {
		return violation("guest uuid %q", h.UUID)
	}
	seen := make(map[string]bool)
	for _, b := range m.Blocks {
		switch {
		case b.Name == "" || len(b.Name) > 255 || seen[b.Name]:
			return violation("memory block name %q", b.Name)
		case b.Size <= 0 || b.Size%PageSize != 0 || b.Size > 1<<46:
			return violation("memory block %q of %d bytes", b.Name, b.Size)
		}
		seen[b.Name] = true
	}
	return nil
}
