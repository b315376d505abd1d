package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

// kubernetesBatch is what is in examples/kubernetes.
type kubernetesBatch struct {
	text      string
	configMap *kubeConfigMap
	claim     *kubeClaim
	job       *kubeJob
	report    *kubeJob
}

// decodeKubernetes decodes batch.yaml and report.yaml.
func decodeKubernetes(t *testing.T, text, report string) (*kubernetesBatch, error) {
	b := &kubernetesBatch{text: text}
	objects, err := manifests(t, text)
	if err != nil {
		return nil, fmt.Errorf("batch.yaml: %w", err)
	}
	for _, object := range objects {
		switch o := object.(type) {
		case *kubeConfigMap:
			b.configMap = o
		case *kubeClaim:
			b.claim = o
		case *kubeJob:
			b.job = o
		}
	}
	merge, err := manifests(t, report)
	if err != nil {
		return nil, fmt.Errorf("report.yaml: %w", err)
	}
	if len(merge) == 1 {
		b.report, _ = merge[0].(*kubeJob)
	}
	if len(objects) != 3 || b.configMap == nil || b.claim == nil || b.job == nil || b.report == nil {
		return nil, errors.New("want a ConfigMap, a PersistentVolumeClaim and a Job, and a Job in report.yaml")
	}
	return b, nil
}

func kubernetesTexts(t *testing.T) (text, report string) {
	t.Helper()
	for name, into := range map[string]*string{"batch.yaml": &text, "report.yaml": &report} {
		b, err := os.ReadFile(filepath.Join(examples, "kubernetes", name))
		if err != nil {
			t.Fatal(err)
		}
		*into = string(b)
	}
	return text, report
}

func readKubernetesBatch(t *testing.T) *kubernetesBatch {
	t.Helper()
	text, report := kubernetesTexts(t)
	b, err := decodeKubernetes(t, text, report)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// problems collects what is wrong.
type problems []string

func (p *problems) add(format string, args ...any) { *p = append(*p, fmt.Sprintf(format, args...)) }

// checkPod looks whether all that a pod names is there, and whether it has no
// privileges: kubernetes.io/docs/concepts/security/pod-security-standards,
// "Restricted", and a root that nobody writes to.
func (b *kubernetesBatch) checkPod(p *kubePodSpec, bad *problems) {
	yes := func(b *bool) bool { return b != nil && *b }
	no := func(b *bool) bool { return b != nil && !*b }
	unused := map[string]bool{}
	for _, v := range p.Volumes {
		if _, twice := unused[v.Name]; twice || !isDNSLabel(v.Name) {
			bad.add("volume %q: a second one of the name, or no name", v.Name)
		}
		unused[v.Name] = true
		switch {
		case v.ConfigMap != nil:
			if v.ConfigMap.Name != b.configMap.Name {
				bad.add("volume %s: there is no ConfigMap %s", v.Name, v.ConfigMap.Name)
			}
		case v.PersistentVolumeClaim != nil:
			if v.PersistentVolumeClaim.ClaimName != b.claim.Name {
				bad.add("volume %s: there is no claim %s", v.Name, v.PersistentVolumeClaim.ClaimName)
			}
		case v.Secret != nil:
			s := v.Secret
			if s.DefaultMode == nil || *s.DefaultMode != 0o400 {
				bad.add("volume %s: mode %v", v.Name, s.DefaultMode)
			}
			// It is not among the manifests, of course: how to make it is said.
			for _, item := range s.Items {
				if how := "kubectl create secret generic " + s.SecretName + " --from-file=" + item.Key + "\n"; !strings.Contains(b.text, how) {
					bad.add("volume %s: nothing says %s", v.Name, how)
				}
			}
		case v.EmptyDir != nil:
		default:
			bad.add("volume %s is of another kind", v.Name)
		}
	}
	pod := p.SecurityContext
	if p.HostNetwork || p.HostPID || p.HostIPC || !no(p.AutomountServiceAccountToken) || pod == nil || !yes(pod.RunAsNonRoot) ||
		pod.RunAsUser == nil || *pod.RunAsUser == 0 || pod.RunAsGroup == nil || *pod.RunAsGroup == 0 || pod.FSGroup == nil ||
		pod.SeccompProfile == nil || pod.SeccompProfile.Type != "RuntimeDefault" {
		bad.add("the pod has privileges: %+v", pod)
	}
	if p.RestartPolicy != "Never" || len(p.Containers) != 1 {
		bad.add("restart policy %s, %d containers", p.RestartPolicy, len(p.Containers))
	}
	for _, c := range slices.Concat(p.InitContainers, p.Containers) {
		s := c.SecurityContext
		if s == nil || !no(s.AllowPrivilegeEscalation) || !yes(s.ReadOnlyRootFilesystem) || s.Capabilities == nil ||
			!slices.Contains(s.Capabilities.Drop, "ALL") || len(s.Capabilities.Add) > 0 || yes(s.Privileged) ||
			s.RunAsUser != nil || s.RunAsNonRoot != nil || s.SeccompProfile != nil {
			bad.add("container %s has privileges: %+v", c.Name, s)
		}
		if c.Resources.Requests.CPU == 0 || c.Resources.Requests.Memory == 0 || c.Resources.Limits.Memory < c.Resources.Requests.Memory {
			bad.add("container %s: resources %+v", c.Name, c.Resources)
		}
		// A secret is a file: in the environment every child would have it.
		if len(c.EnvFrom) > 0 || slices.ContainsFunc(c.Env, func(v kubeEnvVar) bool { return v.ValueFrom != nil || strings.HasPrefix(v.Name, "VDDKCP_") }) {
			bad.add("container %s: environment %+v", c.Name, c.Env)
		}
		paths := map[string]bool{}
		for _, m := range c.VolumeMounts {
			if _, ok := unused[m.Name]; !ok {
				bad.add("container %s: there is no volume %s", c.Name, m.Name)
			}
			unused[m.Name] = false
			if paths[m.MountPath] || !filepath.IsAbs(m.MountPath) {
				bad.add("container %s: %q: two mounts, or no path", c.Name, m.MountPath)
			}
			paths[m.MountPath] = true
		}
	}
	for v, not := range unused {
		if not {
			bad.add("no container mounts volume %s", v)
		}
	}
}

// Kinds of volumes.
func isClaim(v *kubeVolume) bool     { return v.PersistentVolumeClaim != nil }
func isConfigMap(v *kubeVolume) bool { return v.ConfigMap != nil }
func isSecret(v *kubeVolume) bool    { return v.Secret != nil }
func isEmptyDir(v *kubeVolume) bool  { return v.EmptyDir != nil }

// mounted looks whether a pod's first container has path on a volume of a kind,
// and, where the volume is of files that are known, whether it is one of them.
func (b *kubernetesBatch) mounted(p *kubePodSpec, path string, kind func(*kubeVolume) bool, writable bool, bad *problems) {
	best, ok := "", false
	for _, m := range p.Containers[0].VolumeMounts {
		name, below := strings.CutPrefix(path, m.MountPath+"/")
		if !below || len(m.MountPath) < len(best) {
			continue
		}
		best, ok = m.MountPath, false
		for _, v := range p.Volumes {
			if v.Name != m.Name {
				continue
			}
			ok = kind(&v) && m.ReadOnly == !writable
			if v.ConfigMap != nil && b.configMap.Data[name] == "" ||
				v.Secret != nil && !slices.ContainsFunc(v.Secret.Items, func(k kubeKeyToPath) bool { return k.Path == name }) {
				ok = false
			}
		}
	}
	if !ok {
		bad.add("%s is not on a volume of its kind", path)
	}
}

// runLine reads the command line of a container that is vddkcp run.
func runLine(c *kubeContainer) (*batchCommand, error) {
	words := containerCommand(c, nil)
	var line cli
	parser, err := newParser(&line, io.Discard, io.Discard, func(int) {})
	if err != nil {
		return nil, err
	}
	all := strings.Join(words, " ")
	if len(words) < 2 || words[0] != "/usr/local/bin/vddkcp" || words[1] != "run" {
		return nil, fmt.Errorf("command %s, want /usr/local/bin/vddkcp run", all)
	}
	if strings.Contains(all, "$(") {
		return nil, fmt.Errorf("command %s has a variable that nobody sets", all)
	}
	if _, err := parser.Parse(words[1:]); err != nil {
		return nil, fmt.Errorf("command %s: %w", all, err)
	}
	return &line.RunJobs, nil
}

// load reads the job file of the ConfigMap.
func (b *kubernetesBatch) load() (*batch.File, error) {
	parser, err := newJobParser()
	if err != nil {
		return nil, err
	}
	spec, err := parser.spec()
	if err != nil {
		return nil, err
	}
	return batch.Load(strings.NewReader(b.configMap.Data["jobs.json"]), "jobs.json", "/etc/vddkcp", spec)
}

// check looks whether what the manifests say fits together.
func (b *kubernetesBatch) check() (bad problems) {
	b.checkPod(&b.job.Spec.Template.Spec, &bad)
	b.checkPod(&b.report.Spec.Template.Spec, &bad)
	if !slices.Contains(b.claim.Spec.AccessModes, "ReadWriteMany") {
		bad.add("claim: %v", b.claim.Spec.AccessModes)
	}
	file, err := b.load()
	if err != nil {
		bad.add("%v", err)
		return bad
	}
	for _, w := range file.Warnings {
		bad.add("jobs.json: %s", w)
	}
	spec := b.job.Spec
	if spec.Completions == nil || spec.Parallelism == nil || spec.BackoffLimitPerIndex == nil || *spec.BackoffLimitPerIndex < 1 || spec.BackoffLimit != nil ||
		spec.PodReplacementPolicy == nil || *spec.PodReplacementPolicy != "Failed" {
		bad.add("job: %+v", spec)
		return bad
	}
	if grace := spec.Template.Spec.TerminationGracePeriodSeconds; grace == nil || *grace < 60 {
		bad.add("a stop has no time for journals: terminationGracePeriodSeconds")
	}
	shards, together := int(*spec.Completions), int64(*spec.Parallelism)
	if limits := file.Limits; together*limits.NFCBuffer > batch.DefaultNFCBuffer || together*int64(limits.Connections) > batch.DefaultConnections || limits.PerHost == 0 {
		bad.add("limits %+v, of %d shards at once", limits, together)
	}
	first := pod(b.job, 0)
	for _, j := range file.Jobs {
		b.mounted(first, j.Target, isClaim, true, &bad)
		b.mounted(first, strings.TrimPrefix(j.Text("password"), "+"), isSecret, false, &bad)
		b.mounted(first, j.Text("libdir"), isEmptyDir, false, &bad)
		if j.Host == "" || j.Text("thumbprint") == "" {
			bad.add("job %s has no host or no thumbprint", j.Name)
		}
	}
	b.mounted(first, "/tmp/x", isEmptyDir, true, &bad)
	if init := first.InitContainers; len(init) != 1 || init[0].Command != nil || init[0].Args != nil || len(init[0].VolumeMounts) != 1 || init[0].VolumeMounts[0].MountPath != "/opt" {
		bad.add("init containers %+v, want one that mounts /opt and does what its image says", init)
	}

	jobs, used := 0, map[string]bool{}
	for index := range shards {
		p := pod(b.job, index)
		line, err := runLine(&p.Containers[0])
		if err != nil {
			bad.add("index %d: %v", index, err)
			continue
		}
		if want := fmt.Sprintf("%d/%d", index, shards); line.Shard != want || !line.Resume {
			bad.add("index %d runs shard %s, resume %v, want %s", index, line.Shard, line.Resume, want)
		}
		b.mounted(p, line.Jobs, isConfigMap, false, &bad)
		b.mounted(p, line.LogDir+"/x", isClaim, true, &bad)
		for _, path := range append([]string{line.State}, line.Report...) {
			b.mounted(p, path, isClaim, true, &bad)
			if used[path] {
				bad.add("index %d writes %s, which is another's", index, path)
			}
			used[path] = true
		}
		mine, err := line.selected(file)
		if err != nil {
			bad.add("index %d: %v", index, err)
		}
		jobs += len(mine)
	}
	if jobs != len(file.Jobs) {
		bad.add("%d jobs are in the shards, of %d", jobs, len(file.Jobs))
	}

	p := pod(b.report, 0)
	merge, err := runLine(&p.Containers[0])
	if err != nil {
		bad.add("report: %v", err)
		return bad
	}
	for _, path := range append([]string{merge.MergeReports + "/x"}, merge.Report...) {
		b.mounted(p, path, isClaim, true, &bad)
		if filepath.Ext(path) == ".json" && filepath.Dir(path) == merge.MergeReports {
			bad.add("%s would be merged into the next one", path)
		}
	}
	for path := range used {
		if strings.HasSuffix(path, ".report.json") && filepath.Dir(path) != merge.MergeReports {
			bad.add("%s is not where reports are merged from", path)
		}
	}
	if len(merge.Report) != 2 || b.report.Spec.BackoffLimit == nil || *b.report.Spec.BackoffLimit != 0 {
		bad.add("the merge: %+v", merge)
	}
	return bad
}

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

// What becomes of an index, for each way that vddkcp ends.
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
