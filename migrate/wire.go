package migrate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/google/uuid"
)

// ALPN is the TLS application protocol of the connections in PROTOCOL.md.
const ALPN = "lmctl-migrate/1"

// MaxStreams is how many data connections a migration may have.
const MaxStreams = 16

const (
	preambleSize   = 24
	controlHdrSize = 8
	dataHdrSize    = 24

	maxControlBody = 1 << 20
	maxStateChunk  = 256 << 10
	maxAnswer      = 4 << 10
	maxChunk       = 256 << 10 // of a relayed stream, before it is compressed
	maxBlocks      = 64
	maxRunPages    = 512   // pages in one frame
	maxHashes      = 32768 // hashes in one frame
)

var magic = [4]byte{'L', 'M', 'C', 'T'}

const wireVersion = 1

// ErrProtocol is what a peer that breaks PROTOCOL.md gets.
var ErrProtocol = errors.New("protocol violation")

func violation(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}

type role uint8

const (
	roleControl role = 0
	roleData    role = 1
)

// preamble opens each connection.
type preamble struct {
	role  role
	index uint16
	id    uuid.UUID
}

func (p preamble) append(b []byte) []byte {
	b = append(b, magic[:]...)
	b = append(b, wireVersion, byte(p.role))
	b = binary.BigEndian.AppendUint16(b, p.index)
	return append(b, p.id[:]...)
}

func readPreamble(r io.Reader) (preamble, error) {
	var b [preambleSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return preamble{}, fmt.Errorf("read preamble: %w", err)
	}
	return parsePreamble(b[:])
}

func parsePreamble(b []byte) (preamble, error) {
	if len(b) != preambleSize || [4]byte(b[:4]) != magic {
		return preamble{}, violation("not a migration connection")
	}
	if b[4] != wireVersion {
		return preamble{}, violation("version %d, this side speaks %d", b[4], wireVersion)
	}
	p := preamble{role: role(b[5]), index: binary.BigEndian.Uint16(b[6:]), id: uuid.UUID(b[8:24])}
	switch {
	case p.role > roleData:
		return preamble{}, violation("role %d", p.role)
	case p.role == roleControl && p.index != 0, p.index >= MaxStreams:
		return preamble{}, violation("stream index %d", p.index)
	case p.id == uuid.Nil:
		return preamble{}, violation("empty migration id")
	}
	return p, nil
}

type controlType uint8

const (
	ctlOffer controlType = 1 + iota
	ctlPrepared
	ctlRefused
	ctlPassDone
	ctlState
	ctlStopped
	ctlStateEnd
	ctlVerified
	ctlReady
	ctlCommit
	ctlRunning
	ctlOwned
	ctlWithdrawn
	ctlAnnounced
	ctlAbort
	ctlFailed
	ctlPing
	ctlAnswer
	ctlLimit // one past the last
)

var controlNames = [...]string{
	ctlOffer: "offer", ctlPrepared: "prepared", ctlRefused: "refused", ctlPassDone: "pass-done",
	ctlState: "state", ctlStopped: "stopped", ctlStateEnd: "state-end", ctlVerified: "verified",
	ctlReady: "ready", ctlCommit: "commit", ctlRunning: "running", ctlOwned: "owned",
	ctlWithdrawn: "withdrawn", ctlAnnounced: "announced", ctlAbort: "abort", ctlFailed: "failed",
	ctlPing: "ping", ctlAnswer: "answer",
}

func (t controlType) String() string {
	if t == 0 || t >= ctlLimit {
		return fmt.Sprintf("type %d", uint8(t))
	}
	return controlNames[t]
}

func appendControlHeader(b []byte, t controlType, length int) []byte {
	b = append(b, byte(t), 0, 0, 0)
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

func parseControlHeader(b []byte) (controlType, int, error) {
	t, n := controlType(b[0]), binary.BigEndian.Uint32(b[4:8])
	if t == 0 || t >= ctlLimit {
		return 0, 0, violation("control frame of %v", t)
	}
	if b[1] != 0 || b[2] != 0 || b[3] != 0 {
		return 0, 0, violation("%v: reserved bits set", t)
	}
	limit := uint32(maxControlBody)
	switch t {
	case ctlState:
		limit = maxStateChunk
	case ctlAnswer:
		limit = maxAnswer
	}
	if n > limit {
		return 0, 0, violation("%v: body of %d bytes, at most %d", t, n, limit)
	}
	return t, int(n), nil
}

type dataType uint8

const (
	dataPages dataType = 1 + iota
	dataZero
	dataHashes
	dataZeroHashes
	dataEnd
	dataStream
)

// encoding is how a chunk of a relayed stream travels.
type encoding uint8

const (
	plain encoding = iota
	zstandard
)

// dataHeader describes a run of pages on a data connection, or a chunk of a
// relayed stream.
type dataHeader struct {
	typ    dataType
	enc    encoding
	block  uint16
	pages  uint32 // of a chunk: its bytes before compression
	first  uint64 // page index within the block; of a chunk: its number, from 0
	pass   uint32
	length uint32 // bytes of payload
}

func (h dataHeader) put(b []byte) {
	b[0], b[1] = byte(h.typ), byte(h.enc)
	binary.BigEndian.PutUint16(b[2:], h.block)
	binary.BigEndian.PutUint32(b[4:], h.pages)
	binary.BigEndian.PutUint64(b[8:], h.first)
	binary.BigEndian.PutUint32(b[16:], h.pass)
	binary.BigEndian.PutUint32(b[20:], h.length)
}

// parseDataHeader checks all that can be checked without knowing the blocks.
func parseDataHeader(b []byte) (dataHeader, error) {
	h := dataHeader{
		typ:    dataType(b[0]),
		enc:    encoding(b[1]),
		block:  binary.BigEndian.Uint16(b[2:]),
		pages:  binary.BigEndian.Uint32(b[4:]),
		first:  binary.BigEndian.Uint64(b[8:]),
		pass:   binary.BigEndian.Uint32(b[16:]),
		length: binary.BigEndian.Uint32(b[20:]),
	}
	if h.typ == dataStream {
		return h, h.checkChunk()
	}
	if h.enc != plain {
		return h, violation("encoding %d", h.enc)
	}
	var limit, each uint32
	switch h.typ {
	case dataPages:
		limit, each = maxRunPages, PageSize
	case dataHashes:
		limit, each = maxHashes, 8
	case dataZero, dataZeroHashes:
		limit = ^uint32(0)
	case dataEnd:
		if h.block != 0 || h.first != 0 {
			return h, violation("end with a page")
		}
	default:
		return h, violation("data frame of type %d", b[0])
	}
	switch {
	case h.pass == 0:
		return h, violation("pass 0")
	case h.typ != dataEnd && h.pages == 0, h.pages > limit:
		return h, violation("%d pages in a frame of type %d", h.pages, h.typ)
	case uint64(h.length) != uint64(h.pages)*uint64(each):
		return h, violation("%d bytes for %d pages in a frame of type %d", h.length, h.pages, h.typ)
	}
	return h, nil
}

// checkChunk is parseDataHeader's for a chunk of a relayed stream.
func (h dataHeader) checkChunk() error {
	switch {
	case h.block != 0 || h.pass != 1:
		return violation("a chunk of block %d in pass %d", h.block, h.pass)
	case h.pages == 0 || h.pages > maxChunk:
		return violation("a chunk of %d bytes, 1 to %d are allowed", h.pages, maxChunk)
	case h.enc == plain && h.length != h.pages, h.enc == zstandard && (h.length == 0 || h.length >= h.pages), h.enc > zstandard:
		return violation("a chunk of %d bytes with encoding %d takes %d", h.pages, h.enc, h.length)
	}
	return nil
}

// within checks the run against the blocks of the offer.
func (h dataHeader) within(blocks []BlockInfo) error {
	if int(h.block) >= len(blocks) {
		return violation("block %d of %d", h.block, len(blocks))
	}
	total := uint64(blocks[h.block].Size) / PageSize
	if h.first >= total || uint64(h.pages) > total-h.first {
		return violation("pages %d+%d of block %q, which has %d", h.first, h.pages, blocks[h.block].Name, total)
	}
	return nil
}
