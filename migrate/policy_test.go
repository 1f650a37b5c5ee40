package migrate

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestPolicyTranscripts replays passes and checks each decision. A transcript
// begins with "max-passes N target DURATION"; each further line is a pass,
// "sent DIRTY-PAGES speed PAGES/S left PAGES => DECISION", where the decision is
// "again" or the reason to switch over.
func TestPolicyTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/policy/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) { replay(t, file) })
	}
}

func replay(t *testing.T, file string) {
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var p Policy
	passes := 0
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if p.MaxPasses == 0 {
			var target string
			if _, err := fmt.Sscanf(line, "max-passes %d target %s", &p.MaxPasses, &target); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			if p.DowntimeTarget, err = time.ParseDuration(target); err != nil {
				t.Fatal(err)
			}
			continue
		}
		var o PassOutcome
		var want string
		if _, err := fmt.Sscanf(line, "sent %d speed %g left %d => %s", &o.Sent, &o.Speed, &o.DirtyAfter, &want); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		got := string(p.Next(o))
		if got == "" {
			got = "again"
		}
		if got != want {
			t.Errorf("%q: decided %s", line, got)
		}
		passes++
	}
	if passes == 0 {
		t.Error("the transcript has no pass")
	}
}
