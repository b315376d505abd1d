package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/transfer/batch"
)

func TestExampleKubernetes(t *testing.T) {
	for _, problem := range readKubernetesBatch(t).check() {
		t.Error(problem)
	}
}

// Mistakes in the manifests that must be found.
func TestExampleKubernetesMistakes(t *testing.T) {
	text, report := kubernetesTexts(t)
	for _, c := range []struct{ old, new, want string }{
		{"backoffLimitPerIndex:", "backoffLimitsPerIndex:", `unknown field "spec.backoffLimitsPerIndex"`},
		{"readOnlyRootFilesystem:", "readOnlyRootFileSystem:", "unknown field"}, // encoding/json would take it
		{"completions: 4\n", "completions: 4\n  completions: 4\n", "already set"},
		{"parallelism: 2", "parallelism: two", "cannot unmarshal string"},
		{"completions: 4", "completions: 3", "index 0 runs shard 0/4"},
		{"completions: 4", "completions: 5", "index 4"},
		{"  completionMode: Indexed\n", "", "a variable that nobody sets"},
		{"$(JOB_COMPLETION_INDEX)/4", "$(JOB_INDEX)/4", "a variable that nobody sets"},
		{"$(JOB_COMPLETION_INDEX).state", "0.state", "which is another's"},
		{"--resume", "--resme", "unknown flag --resme"},
		{"            - name: images\n              mountPath: /images\n", "", "no container mounts volume images"},
		{"            - name: images\n              mountPath: /images\n", "            - name: image\n              mountPath: /images\n", "there is no volume image"},
		{"mountPath: /run/secrets/vddkcp", "mountPath: /run/secrets", "/run/secrets/vddkcp/password is not"},
		{"            - name: tmp\n              mountPath: /tmp\n", "", "/tmp/x is not"},
		{"claimName: vddkcp", "claimName: images", "there is no claim images"},
		{"secretName: vddkcp", "secretName: vc", "nothing says kubectl create secret generic vc"},
		{"defaultMode: 0400", "defaultMode: 400", "volume password: mode"},
		{"runAsUser: 107", "runAsUser: 0", "the pod has privileges"},
		{"drop: [ALL]", "add: [SYS_ADMIN]", "has privileges"},
		{"allowPrivilegeEscalation: false", "privileged: true", "has privileges"},
		{"automountServiceAccountToken: false\n", "", "the pod has privileges"},
		{`"rounds": 2`, `"round": 2`, "limits.round: unknown field"},
		{`"+/run/secrets/vddkcp/password"`, `"geheim"`, "password"},
		{"parallelism: 2", "parallelism: 4", "of 4 shards at once"},
		{"      terminationGracePeriodSeconds: 120\n", "", "no time for journals"},
		{"--report=/images/logs/report.json", "--report=/images/report.json", "would be merged into the next one"},
	} {
		change := func(s string) string { return strings.Replace(s, c.old, c.new, 1) }
		changed, changedReport := change(text), report
		if changed == text {
			changedReport = change(report)
		}
		if changed == text && changedReport == report {
			t.Errorf("there is no %q", c.old)
			continue
		}
		var found problems
		if b, err := decodeKubernetes(t, changed, changedReport); err != nil {
			found.add("%v", err)
		} else {
			found = b.check()
		}
		if all := strings.Join(found, "\n"); !strings.Contains(all, c.want) {
			t.Errorf("%q for %q: found %s, want %s", c.new, c.old, all, c.want)
		}
	}
}

// TestExampleKubernetesFailures checks how Kubernetes treats an index for each exit
// status of vddkcp.
func TestExampleKubernetesFailures(t *testing.T) {
	policy := readKubernetesBatch(t).job.Spec.PodFailurePolicy
	for _, c := range []struct {
		container string
		exit      int
		condition string
		want      string
	}{
		{"vddkcp", 1, "", "FailIndex"},
		{"vddkcp", 2, "", "FailIndex"},
		{"vddkcp", 4, "", "FailIndex"},
		{"vddkcp", 75, "", "Count"},
		{"vddkcp", 137, "", "Count"}, // the memory was too little
		{"vddkcp", 143, "", "Count"}, // somebody deleted the pod
		{"vddkcp", 143, "DisruptionTarget", "Ignore"},
		{"vddkcp", 1, "DisruptionTarget", "Ignore"},
		{"vddk", 1, "", "Count"}, // cp found no room
	} {
		var conditions []string
		if c.condition != "" {
			conditions = append(conditions, c.condition)
		}
		if got := podFailed(policy, c.container, c.exit, conditions...); got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

// The image that the Dockerfile makes is the one that the pods need.
func TestExampleKubernetesDockerfile(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(examples, "kubernetes/Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	b := readKubernetesBatch(t)
	security := b.job.Spec.Template.Spec.SecurityContext
	for _, want := range []string{
		`COPY --from=build \S+ ` + b.job.Spec.Template.Spec.Containers[0].Command[0] + "\n",
		fmt.Sprintf("USER %d:%d\n", *security.RunAsUser, *security.RunAsGroup),
		"-t " + regexp.QuoteMeta(b.job.Spec.Template.Spec.Containers[0].Image) + " ",
		"FROM debian:", // glibc
	} {
		if !regexp.MustCompile(want).Match(text) {
			t.Errorf("the Dockerfile has no %s", want)
		}
	}
	if b.report.Spec.Template.Spec.Containers[0].Image != b.job.Spec.Template.Spec.Containers[0].Image {
		t.Error("the two Jobs have different images")
	}
}

// All indexes run, as the pods would. One loses its node in the middle and then
// is drained, one finds a wrong password, one a server that fails; when all are
// done each is run once more, and the reports are merged.
func TestExampleKubernetesRuns(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "qemu-img", "gcc", "cp")
	b := readKubernetesBatch(t)
	file, err := b.load()
	if err != nil {
		t.Fatal(err)
	}
	var disks []string
	source := map[string]string{}
	for _, j := range file.Jobs {
		disk := strings.NewReplacer("[", "", "] ", "/").Replace(j.Source)
		disks = append(disks, disk)
		source[filepath.Base(j.Target)] = disk
	}
	lib := standInServer(t, disks...)
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}

	// The library of the image does not have its script and its disks.
	standIn := filepath.Join(t.TempDir(), "standin")
	login := "user backup@vsphere.local\npassword geheim\nthumbprint " + pairs(strings.Repeat("AB", 20)) + "\n"
	script := func(more string) {
		put(t, filepath.Join(standIn, "vddktest.conf"), login+more)
		if err := os.Remove(filepath.Join(standIn, "vddktest.state")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	script("")
	if err := os.Rename(filepath.Join(lib, "disks"), filepath.Join(standIn, "disks")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(lib, "vddktest.conf")); err != nil {
		t.Fatal(err)
	}
	user, group := int(*b.job.Spec.Template.Spec.SecurityContext.RunAsUser), int(*b.job.Spec.Template.Spec.SecurityContext.RunAsGroup)
	err = filepath.WalkDir(standIn, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chown(path, user, group))
	})
	if err != nil {
		t.Fatal(err)
	}

	template := b.job.Spec.Template.Spec
	images := t.TempDir()
	password := map[string]string{"password": "geheim\n"}
	k := &kubelet{
		t: t,
		images: map[string]image{
			// The program that loads libraries is in vddkcp only when make built it.
			template.Containers[0].Image: {files: map[string]string{
				"/usr/local/bin/vddkcp":             program,
				"/usr/local/bin/vddkcp-vddk-worker": filepath.Join(filepath.Dir(program), "vddkcp-vddk-worker"),
			}},
			// As KubeVirt's documentation has it built.
			template.InitContainers[0].Image: {
				files:      map[string]string{"/vmware-vix-disklib-distrib": lib, "/usr/bin/cp": "/usr/bin/cp"},
				entrypoint: []string{"/usr/bin/cp", "-r", "/vmware-vix-disklib-distrib", "/opt"},
			},
		},
		configMaps: map[string]map[string]string{b.configMap.Name: b.configMap.Data},
		secrets:    map[string]map[string]string{"vddkcp": password},
		claims:     map[string]string{b.claim.Name: images},
		extra:      map[string]string{"/standin": standIn},
		env:        []string{"VDDK_TEST_SCRIPT=/standin/vddktest.conf"},
	}
	ends := func(index, want int, action string, conditions ...string) func(result) {
		return func(r result) {
			t.Helper()
			if r.exit != want {
				t.Fatalf("index %d: exit status %d, want %d\n%s", index, r.exit, want, r.stderr)
			}
			if want == 0 {
				return
			}
			if got := podFailed(b.job.Spec.PodFailurePolicy, template.Containers[0].Name, r.exit, conditions...); got != action {
				t.Errorf("index %d: exit status %d is %s, want %s", index, r.exit, got, action)
			}
		}
	}

	// The disk of index 0 is large, and comes slowly until two of its pods are gone.
	large := filepath.Join(standIn, "disks", source["db01-0.raw"])
	if err := os.WriteFile(large, bytes.Repeat([]byte("vddkcp\n\n"), 8<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	script("host-bandwidth 10\n")
	partial := filepath.Join(images, "db01-0.raw.partial")
	stopped := func(signal syscall.Signal) func(*os.Process) {
		return func(p *os.Process) {
			waitFor(t, "bytes of db01-0.raw", func() bool {
				var st syscall.Stat_t
				return syscall.Stat(partial, &st) == nil && st.Blocks*512 >= 4<<20
			})
			if err := p.Signal(signal); err != nil {
				t.Error(err)
			}
		}
	}
	ends(0, 137, "Count")(k.run(pod(b.job, 0), stopped(syscall.SIGKILL)))
	if err := os.Remove(partial); err != nil { // or the next one would seem to have come far
		t.Fatal(err)
	}
	ends(0, 143, "Ignore", "DisruptionTarget")(k.run(pod(b.job, 0), stopped(syscall.SIGTERM)))
	script("fault ReadAsync do=fail code=1\n")
	// The server fails for as long as vddkcp waits, which is 15 minutes otherwise.
	impatient := strings.Replace(b.configMap.Data["jobs.json"], `"verify": true`, `"verify": true, "retries": 0`, 1)
	k.configMaps[b.configMap.Name] = map[string]string{"jobs.json": impatient}
	ends(3, 75, "Count")(k.run(pod(b.job, 3), nil))
	k.configMaps[b.configMap.Name] = b.configMap.Data
	script("")
	k.secrets["vddkcp"] = map[string]string{"password": "falsch\n"}
	ends(1, 1, "FailIndex")(k.run(pod(b.job, 1), nil))
	k.secrets["vddkcp"] = password

	targets := func() map[string]os.FileInfo {
		all := map[string]os.FileInfo{}
		for name := range source {
			fi, err := os.Stat(filepath.Join(images, name))
			if err != nil {
				t.Fatal(err)
			}
			all[name] = fi
		}
		return all
	}
	for index := range int(*b.job.Spec.Completions) {
		ends(index, 0, "")(k.run(pod(b.job, index), nil))
	}
	for name, disk := range source {
		peer.Run(t, "qemu-img", "compare", "-F", "raw", filepath.Join(images, name), filepath.Join(standIn, "disks", disk))
	}

	// A pod that is lost after its last job is replaced, and has nothing to do: the
	// library is not even loaded.
	before := targets()
	script("")
	for index := range int(*b.job.Spec.Completions) {
		ends(index, 0, "")(k.run(pod(b.job, index), nil))
	}
	for name, fi := range targets() {
		if !os.SameFile(fi, before[name]) || !fi.ModTime().Equal(before[name].ModTime()) {
			t.Errorf("%s was copied again", name)
		}
	}
	if _, err := os.Stat(filepath.Join(standIn, "vddktest.state")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the library was used: %v", err)
	}

	for range 2 { // the second one must not take the first one's for a shard's
		ends(0, 0, "")(k.run(pod(b.report, 0), nil))
	}
	var r batch.Report
	text, err := os.ReadFile(filepath.Join(images, "logs/report.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	var names, want []string
	for _, j := range r.Jobs {
		names = append(names, j.Name)
		if j.Verify.Status != "ok" || (j.ResumedFrom > 0) != (j.Name == "db01/system") {
			t.Errorf("job %s: verify %+v, resumed from %d", j.Name, j.Verify, j.ResumedFrom)
		}
	}
	for _, j := range file.Jobs {
		want = append(want, j.Name)
	}
	slices.Sort(want)
	if !slices.Equal(names, want) || r.Counts != (batch.Counts{Done: len(want)}) {
		t.Errorf("the merged report has %v, %+v", names, r.Counts)
	}
	err = filepath.WalkDir(images, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		if err == nil && bytes.Contains(text, []byte("geheim")) {
			t.Errorf("%s has the password", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
