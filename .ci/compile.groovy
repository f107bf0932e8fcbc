// Parses Groovy files: as far as the compiler comes without QuPath's classes.
import org.codehaus.groovy.control.CompilationUnit
import org.codehaus.groovy.control.Phases

args.each { file ->
    def unit = new CompilationUnit()
    unit.addSource(new File(file))
    unit.compile(Phases.CONVERSION)
    println "${file}: parsed by Groovy ${GroovySystem.getVersion()}"
}
