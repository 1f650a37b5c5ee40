package migrate

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/uuid"
)

var testID = uuid.MustParse("0f0e0d0c-0b0a-4908-8706-050403020100")

func TestPreamble(t *testing.T) {
	good := preamble{role: roleData, index: 3, id: testID}.append(nil)
	want := []byte("LMCT\x01\x01\x00\x03\x0f\x0e\x0d\x0c\x0b\x0a\x49\x08\x87\x06\x05\x04\x03\x02\x01\x00")
	if !bytes.Equal(good, want) {
		t.Fatalf("preamble is % x, PROTOCOL.md says % x", good, want)
	}
	got, err := readPreamble(bytes.NewReader(good))
	if err != nil || got != (preamble{role: roleData, index: 3, id: testID}) {
		t.Fatalf("read back %+v, %v", got, err)
	}
	for name, change := range map[string]func([]byte) []byte{
		"short":           func(b []byte) []byte { return b[:20] },
		"magic":           func(b []byte) []byte { b[0] = 'X'; return b },
		"version":         func(b []byte) []byte { b[4] = 2; return b },
		"role":            func(b []byte) []byte { b[5] = 2; return b },
		"index":           func(b []byte) []byte { b[7] = MaxStreams; return b },
		"control's index": func(b []byte) []byte { b[5] = 0; return b },
		"empty id":        func(b []byte) []byte { clear(b[8:]); return b },
	} {
		if p, err := readPreamble(bytes.NewReader(change(bytes.Clone(good)))); err == nil {
			t.Errorf("%s: taken as %+v", name, p)
		}
	}
}

func TestControlHeader(t *testing.T) {
	b := appendControlHeader(nil, ctlState, maxStateChunk)
	if typ, n, err := parseControlHeader(b); typ != ctlState || n != maxStateChunk || err != nil {
		t.Fatalf("got %v, %d, %v", typ, n, err)
	}
	for name, b := range map[string][]byte{
		"type 0":          {0, 0, 0, 0, 0, 0, 0, 0},
		"unknown type":    {byte(ctlLimit), 0, 0, 0, 0, 0, 0, 0},
		"reserved bits":   {byte(ctlPing), 0, 1, 0, 0, 0, 0, 0},
		"oversize body":   {byte(ctlOffer), 0, 0, 0, 0, 0x10, 0, 1},
		"oversize state":  {byte(ctlState), 0, 0, 0, 0, 0x04, 0, 1},
		"gigantic length": {byte(ctlOffer), 0, 0, 0, 0xff, 0xff, 0xff, 0xff},
	} {
		if _, _, err := parseControlHeader(b); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDataHeader(t *testing.T) {
	blocks := []BlockInfo{{Name: "ram", Size: 1024 * PageSize}}
	good := dataHeader{typ: dataPages, pages: 2, first: 1022, pass: 1, length: 2 * PageSize}
	check := func(h dataHeader) error {
		b := make([]byte, dataHdrSize)
		h.put(b)
		got, err := parseDataHeader(b)
		if err != nil {
			return err
		}
		if got != h {
			t.Errorf("%+v read back as %+v", h, got)
		}
		return got.within(blocks)
	}
	if err := check(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*dataHeader){
		"type":             func(h *dataHeader) { h.typ = dataEnd + 1 },
		"pass 0":           func(h *dataHeader) { h.pass = 0 },
		"no pages":         func(h *dataHeader) { h.pages, h.length = 0, 0 },
		"too many pages":   func(h *dataHeader) { h.pages, h.length = maxRunPages+1, (maxRunPages+1)*PageSize },
		"short payload":    func(h *dataHeader) { h.length-- },
		"zero with bytes":  func(h *dataHeader) { h.typ = dataZero },
		"block":            func(h *dataHeader) { h.block = 1 },
		"past the end":     func(h *dataHeader) { h.first = 1023 },
		"wraps around":     func(h *dataHeader) { h.first = ^uint64(0) },
		"end with a page":  func(h *dataHeader) { h.typ, h.pages, h.length = dataEnd, 0, 0 },
		"end with a count": func(h *dataHeader) { h.typ, h.first = dataEnd, 0 },
	} {
		h := good
		change(&h)
		if err := check(h); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOfferCheck(t *testing.T) {
	valid := func() offerMsg {
		return offerMsg{
			Handover: Handover{ID: testID.String(), Guest: "g", UUID: testID.String(), Source: "host1", Destination: "host2", Epoch: 2},
			Mode:     Direct, Blocks: []BlockInfo{{Name: "ram", Size: PageSize}}, Streams: 2,
		}
	}
	if m := valid(); m.check(testID, "host1", "host2") != nil {
		t.Fatal("a good offer is refused")
	}
	for name, change := range map[string]func(*offerMsg){
		"other migration":   func(m *offerMsg) { m.Handover.ID = uuid.NewString() },
		"in another's name": func(m *offerMsg) { m.Handover.Source = "host3" },
		"other host":        func(m *offerMsg) { m.Handover.Destination = "host3" },
		"no guest":          func(m *offerMsg) { m.Handover.Guest = "" },
		"long guest":        func(m *offerMsg) { m.Handover.Guest = strings.Repeat("g", 256) },
		"uuid":              func(m *offerMsg) { m.Handover.UUID = "../../etc" },
		"epoch":             func(m *offerMsg) { m.Handover.Epoch = 0 },
		"no streams":        func(m *offerMsg) { m.Streams = 0 },
		"many streams":      func(m *offerMsg) { m.Streams = MaxStreams + 1 },
		"no memory":         func(m *offerMsg) { m.Blocks = nil },
		"many blocks":       func(m *offerMsg) { m.Blocks = make([]BlockInfo, maxBlocks+1) },
		"odd size":          func(m *offerMsg) { m.Blocks[0].Size = 5000 },
		"negative size":     func(m *offerMsg) { m.Blocks[0].Size = -PageSize },
		"gigantic size":     func(m *offerMsg) { m.Blocks[0].Size = 1 << 60 },
		"twice":             func(m *offerMsg) { m.Blocks = append(m.Blocks, m.Blocks[0]) },
	} {
		m := valid()
		change(&m)
		if err := m.check(testID, "host1", "host2"); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestDecodeBodyIsStrict(t *testing.T) {
	var m passDoneMsg
	for _, body := range []string{``, `{"pass":1,"more":2}`, `{"pass":1}{}`, `{"pass":-1}`, `[1]`} {
		if err := decodeBody(ctlPassDone, []byte(body), &m); !errors.Is(err, ErrProtocol) {
			t.Errorf("%q: %v", body, err)
		}
	}
	if err := decodeBody(ctlPassDone, []byte(`{"pass":7}`), &m); err != nil || m.Pass != 7 {
		t.Errorf("got %d, %v", m.Pass, err)
	}
}

func FuzzDataHeader(f *testing.F) {
	b := make([]byte, dataHdrSize)
	dataHeader{typ: dataPages, pages: 2, first: 7, pass: 1, length: 2 * PageSize}.put(b)
	f.Add(b)
	dataHeader{typ: dataEnd, pass: 9}.put(b)
	f.Add(bytes.Clone(b))
	blocks := []BlockInfo{{Name: "a", Size: 100 * PageSize}, {Name: "b", Size: 5000 * PageSize}}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) != dataHdrSize {
			return
		}
		h, err := parseDataHeader(b)
		if err != nil || h.within(blocks) != nil {
			return
		}
		if h.typ != dataEnd && (int64(h.first)+int64(h.pages))*PageSize > blocks[h.block].Size {
			t.Errorf("%+v is outside of its block", h)
		}
		if h.length > maxRunPages*PageSize {
			t.Errorf("%+v has a payload of %d bytes", h, h.length)
		}
	})
}

func FuzzControlHeader(f *testing.F) {
	f.Add(appendControlHeader(nil, ctlOffer, 100))
	f.Add(appendControlHeader(nil, ctlState, maxStateChunk))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) != controlHdrSize {
			return
		}
		if typ, n, err := parseControlHeader(b); err == nil && (n > maxControlBody || typ >= ctlLimit) {
			t.Errorf("%v with %d bytes is taken", typ, n)
		}
	})
}

func FuzzPreamble(f *testing.F) {
	f.Add(preamble{role: roleControl, id: testID}.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parsePreamble(b)
		if err == nil && !bytes.Equal(p.append(nil), b) {
			t.Errorf("% x is read as %+v", b, p)
		}
	})
}

func FuzzOffer(f *testing.F) {
	f.Add([]byte(`{"handover":{"id":"0f0e0d0c-0b0a-4908-8706-050403020100","guest":"g","uuid":"0f0e0d0c-0b0a-4908-8706-050403020100","source":"host1","destination":"host2","epoch":2},"definition":"e30=","blocks":[{"name":"ram","size":4096}],"streams":1,"verify":true}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var m offerMsg
		if decodeBody(ctlOffer, b, &m) != nil || m.check(testID, "host1", "host2") != nil {
			return
		}
		for _, bl := range m.Blocks {
			if bl.Size <= 0 || bl.Size%PageSize != 0 {
				t.Errorf("block of %d bytes is taken", bl.Size)
			}
		}
	})
}
